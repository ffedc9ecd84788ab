"""Times, ages and untrusted text in the form that people read."""

from __future__ import annotations

from datetime import UTC, datetime


def to_iso(ts: float) -> str:
    """Seconds since the epoch as `2026-11-22T03:14:07.123Z`."""
    return datetime.fromtimestamp(ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_iso(text: str) -> float:
    """The inverse of `to_iso`."""
    return datetime.fromisoformat(text).timestamp()


def printable(value: str) -> str:
    """Untrusted text for a terminal: one line, no control characters."""
    if value.isprintable():
        return value
    return "".join(character if character.isprintable() else "�" for character in value.replace("\n", " "))


def age(seconds: float) -> str:
    """`3h12m`, `22m`, `45s`."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def iso(ts: float | None) -> str | None:
    """For JSON."""
    return None if ts is None else to_iso(ts)


def clock(ts: float) -> str:
    """For tables: `2026-11-22 03:14:07Z`."""
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
