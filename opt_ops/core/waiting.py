"""Waiting by a clock that people and time servers set."""

_SKEW = 60.0  # seconds that two hosts' clocks may differ


def still_waiting(now: float, since: float, seconds: float) -> bool:
    """Whether a wait of so many seconds goes on. A clock that was set back an hour ends it, and does not prolong it."""
    return -_SKEW <= now - since < seconds
