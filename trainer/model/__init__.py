"""The OPT model, its dropout, its precision and its cost."""
