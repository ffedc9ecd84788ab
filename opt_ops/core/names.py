"""Numbers and names: lineage `12`, run `12.01`, attempt `12.01-a3`, incident `12-i003`, log entry `12-e57`."""

from __future__ import annotations

import re

_ID = re.compile(r"(?P<lineage>\d+)(?:\.(?P<run>\d{2,})(?:-a(?P<attempt>\d+))?|-i\d{3,}|-e\d+)?")


def run_name(lineage: str, number: int) -> str:
    """`12`, 1 → `12.01`."""
    return f"{lineage}.{number:02d}"


def attempt_name(run: str, number: int) -> str:
    """`12.01`, 3 → `12.01-a3`."""
    return f"{run}-a{number}"


def attempt_folder(attempt: str) -> str:
    """`12.01-a3` → `12.01/a3`, below the lineage's folder."""
    run, _, number = attempt.partition("-")
    return f"{run}/{number}"


def lineage_of(identifier: str) -> str:
    """The lineage that `12`, `12.01`, `12.01-a3`, `12-i003` or `12-e57` belongs to.

    Raises:
        ValueError: it is none of these.
    """
    match = _ID.fullmatch(identifier)
    if match is None:
        raise ValueError(f"{identifier!r} is no lineage (12), run (12.01), attempt (12.01-a3) or incident (12-i003)")
    return match["lineage"]
