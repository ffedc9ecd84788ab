"""Times, ages and untrusted text in the form that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime

# What a terminal obeys or hides, and JSON leaves as it is: 8-bit controls, marks that reverse the direction of text,
# invisible characters, line separators, halves of a surrogate pair, tags. Python's str.isprintable() says no to each.
_OBEYED = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


_LAST = datetime(9999, 12, 31, tzinfo=UTC)
_FIRST = datetime(1, 1, 1, tzinfo=UTC)


def moment(ts: float) -> datetime:
    """Seconds since the epoch in UTC. A time before year 1 or after year 9999 becomes the nearest of these.

    Clocks of hosts may be absurd, and an estimate may lie ages ahead: neither may end a display.
    """
    if ts >= _LAST.timestamp():
        return _LAST
    return datetime.fromtimestamp(ts, UTC) if ts > _FIRST.timestamp() else _FIRST


def to_iso(ts: float) -> str:
    """Seconds since the epoch as `2026-11-22T03:14:07.123Z`."""
    return moment(ts).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_iso(text: str) -> float:
    """The inverse of `to_iso`."""
    return datetime.fromisoformat(text).timestamp()


def printable(value: str) -> str:
    """Untrusted text for a terminal: one line, no control characters."""
    if value.isprintable():
        return value
    return "".join(character if character.isprintable() else "�" for character in value.replace("\n", " "))


def clean(value: str, longest: int) -> str:
    """Untrusted text that can be written as UTF-8, cut to `longest` characters. A lone surrogate becomes `�`."""
    value = value[:longest]
    try:
        value.encode()
    except UnicodeEncodeError:
        return "".join("�" if "\ud800" <= each <= "\udfff" else each for each in value)
    return value


def printable_lines(value: str) -> str:
    """Untrusted text of several lines for a terminal: line ends stay, no other control characters."""
    return "\n".join(map(printable, value.split("\n")))


def safe_json(document: str) -> str:
    """JSON for a terminal: what a terminal would obey or hide is escaped. A parser reads the same values as before."""
    return _OBEYED.sub(_escaped, document)


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")  # JSON escapes a character beyond U+FFFF as two units
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


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


def duration(seconds: float) -> str:
    """`4.6 s`, `46 s`, `4 min 10 s`, `3 h 12 min`, `2 d 4 h`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.05:
        return "0 s" if seconds <= 0 else "< 0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(number: int, noun: str, nouns: str = "") -> str:
    """`1 step`, `2,240 steps`."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def number_spans(numbers: Iterable[int]) -> str:
    """`0–5, 7`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)


def iso(ts: float | None) -> str | None:
    """For JSON."""
    return None if ts is None else to_iso(ts)


def clock(ts: float) -> str:
    """For tables: `2026-11-22 03:14:07Z`."""
    return moment(ts).strftime("%Y-%m-%d %H:%M:%SZ")
