"""Detectors over telemetry, one a file."""
