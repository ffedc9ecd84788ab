"""The command `opt-ops daemon`."""
