"""Estimate memory and speed of a training run before nodes are booked."""
