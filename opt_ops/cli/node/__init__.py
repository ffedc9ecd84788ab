"""The command `opt-ops node`."""
