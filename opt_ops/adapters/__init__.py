"""Adapters to the world outside the run folder: schedulers and alert services."""
