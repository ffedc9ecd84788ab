"""What is known about a promise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a promise is kept, and what was seen.

    Attributes:
        ok: None if it could not be judged.
        why: What was seen and at which step, or why it could not be judged.
    """

    ok: bool | None
    why: str


def on_ranks(world: int) -> str:
    """`1 rank`, `2 ranks`."""
    return "1 rank" if world == 1 else f"{world} ranks"


def kept(why: str) -> Finding:
    """The promise is kept."""
    return Finding(True, why)


def broken(why: str) -> Finding:
    """The promise is broken."""
    return Finding(False, why)


def unknown(why: str) -> Finding:
    """The promise could not be judged."""
    return Finding(None, why)
