"""Entries of the logbook, one module for each kind of thing that happened."""
