"""Measurements, run by hand; RESULTS.md has what came of them."""
