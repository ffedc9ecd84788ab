"""The command `opt-ops trainer`."""
