"""The command `opt-ops logbook`."""
