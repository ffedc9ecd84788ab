"""The command `opt-ops campaign`."""
