"""What a trainer, a node and the supervisor agree on. Standard library only, so that any trainer may import it."""
