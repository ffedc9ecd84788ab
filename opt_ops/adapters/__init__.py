"""Hands and eyes: the only modules that touch a scheduler, a driver library or a run folder's files."""
