"""Supervises a training run: sees what goes wrong, recovers by playbooks, proves it, and writes it down."""

__version__ = "0.1.0"
