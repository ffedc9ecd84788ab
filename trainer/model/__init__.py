"""The OPT model, its dropout, its number formats and its cost."""
