"""Recovery in place: a rank is lost, the others keep their processes and go on with a replacement."""
