"""A curve as lines of text: dots of braille signs, two wide and four high in each character."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

_BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille sign, by row and column
_BRAILLE = 0x2800
_AROUND = 8  # values on each side that a point of the line is the median of


def curve(values: Sequence[float | None], width: int, height: int) -> list[str]:
    """Draw values from left to right in `height` lines of `width` characters.

    Each value is a dot, so that no spike is lost; their running median is a line. A value that is not finite is a cross
    at the top.

    Args:
        values: Oldest first; None where one was not finite.
        width: In characters.
        height: In lines.
    """
    columns, rows = 2 * width, 4 * height
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (rows - 1) / ((high - low) or 1.0)
    across = min(1.0, columns / max(1, len(values)))  # of few values, each has its own column

    def row(value: float) -> int:
        return rows - 1 - round((value - low) * scale)

    filled: set[tuple[int, int]] = set()
    before: int | None = None
    for at, value in enumerate(values):
        column = int(at * across)
        if value is not None:
            filled.add((row(value), column))
        around = [each for each in values[max(0, at - _AROUND) : at + _AROUND + 1] if each is not None]
        if around:
            here = row(median(around))
            filled |= {(down, column) for down in _between(here if before is None else before, here)}
            before = here
    lines = [[_sign(filled, down, column) for column in range(width)] for down in range(height)]
    for at, value in enumerate(values):
        if value is None:
            lines[0][int(at * across) // 2] = "×"
    return ["".join(line) for line in lines]


def _between(start: int, end: int) -> range:
    return range(min(start, end), max(start, end) + 1)


def _sign(filled: set[tuple[int, int]], row: int, column: int) -> str:
    dots = sum(
        bit
        for down, bits in enumerate(_DOTS)
        for right, bit in enumerate(bits)
        if (4 * row + down, 2 * column + right) in filled
    )
    return chr(_BRAILLE + dots) if dots else " "


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as one line of bars. A value that is not finite is a cross."""
    per = max(1, len(values) // width)
    groups = [values[start : start + per] for start in range(0, len(values), per)][-width:]
    tops = [max((v for v in group if v is not None), default=None) if None not in group else None for group in groups]
    known = [top for top in tops if top is not None]
    if not known:
        return "×" * len(tops)
    return bars(tops, min(known), max(known), none="×")


def bars(values: Sequence[float | None], low: float, high: float, none: str = " ") -> str:
    """Each value as a bar on a scale from `low` to `high`; `none` where there is none."""
    scale = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(none if value is None else _BARS[round((value - low) * scale)] for value in values)
