"""What one line of a log tells, and how trainers write numbers and times."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from opt_ops.runfolder.fields import LARGEST_FLOAT, LAST_MOMENT, MOST_STEPS

_SUFFIXES: Mapping[str, float] = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"[+-]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")
_NOT_FINITE: Mapping[str, float] = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}
LONGEST_NUMBER = 64  # characters

NUMBER = (
    r"[+-]?(?:(?:\d(?:[\d_]|,(?=\d))*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?\s?[KMBGT]?"
    r"|nan|NaN|NAN|inf|Inf|INF|infinity|Infinity)(?!\w)"
)
"""A number as trainers write it: `3.412`, `6.0E-04`, `1,234`, `98.21K`, `nan`. For the patterns of formats."""

_ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6})\d*)?\s?(Z|[+-]\d\d:?\d\d)?",
)
_AMERICAN = re.compile(r"\b(\d\d)/(\d\d)/(\d{4}) (\d\d:\d\d:\d\d)")
_STAMP_WITHIN = 160  # characters from the start of a line
_FIRST_MOMENT = 946_684_800.0  # the year 2000: an older stamp is no time of a training


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one line, or one block of lines, says about one update. None: it does not say.

    A number that is not finite stays so (`nan`, `inf`). `step` None: the line has no step, and it is to be counted.
    """

    step: int | None = None
    loss: float | None = None  # nats
    gnorm: float | None = None
    lr: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    tokens: int | None = None  # that are trained up to here
    loss_scale: float | None = None
    batch: int | None = None  # sequences of the global batch
    at: float | None = None  # the line's own stamp, seconds since the epoch
    steps: int | None = None  # the last one that will be trained
    nan_updates: int = 0  # since the line before
    skipped_updates: int = 0  # since the line before
    loss_missing: bool = False  # the trainer leaves the loss out of such a line when it is not a number


def number(text: str | None) -> float | None:
    """A number as trainers write it: with commas, a letter for thousands, `nan` or `inf`; None if it is none."""
    if text is None:
        return None
    text = text.strip().strip("'\"").strip()[:LONGEST_NUMBER]
    low = text.lower().lstrip("+-")
    if low in _NOT_FINITE:
        value = _NOT_FINITE[low]
        return -value if text.startswith("-") else value
    found = _NUMBER.match(text)
    if found is None:
        return None
    rest = text[found.end() :].strip()
    factor = 1.0 if not rest else _SUFFIXES.get(rest.lower(), 0.0)
    if not factor:
        return None
    try:
        value = float(found[0].replace(",", "").replace("_", "")) * factor
    except (ValueError, OverflowError):
        return None
    return value if not math.isfinite(value) else min(max(value, -LARGEST_FLOAT), LARGEST_FLOAT)


def whole(text: str | None) -> int | None:
    """A count from 0 to 10^9, as a step is; None if it is none."""
    value = number(text)
    if value is None or not math.isfinite(value) or not 0 <= value <= MOST_STEPS or value != int(value):
        return None
    return int(value)


def positive(text: str | None) -> float | None:
    """A finite number above 0; None if it is none."""
    value = number(text)
    return value if value is not None and math.isfinite(value) and value > 0 else None


def stamp(line: str) -> float | None:
    """The time at the start of a line, seconds since the epoch; None if there is none. Without a zone: local time."""
    head = line[:_STAMP_WITHIN]
    try:
        if found := _ISO.search(head):
            zone = (found[4] or "").replace("Z", "+00:00")
            text = f"{found[1]}T{found[2]}.{(found[3] or '0').ljust(6, '0')}{zone}"
        elif found := _AMERICAN.search(head):
            text = f"{found[3]}-{found[1]}-{found[2]}T{found[4]}"
        else:
            return None
        at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return at if _FIRST_MOMENT <= at <= LAST_MOMENT else None
