"""The logbook: its pages, its tables, its front page."""
