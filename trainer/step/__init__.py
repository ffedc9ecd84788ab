"""One training step, and everything that it measures."""
