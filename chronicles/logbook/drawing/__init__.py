"""Figures, Markdown and HTML of the logbook."""
