"""Failure classes: the one table of them, why an attempt ended, and the sentence that names a cause."""
