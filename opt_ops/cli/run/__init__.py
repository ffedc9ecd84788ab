"""The command `opt-ops run`."""
