"""Axes of a drawing: from values to pixels, and the round values at which they are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

_THOUSANDS = ("", "thousand", "million", "billion", "trillion", "quadrillion", "quintillion")
_FINE = 1000  # places that an axis has at least


def axis_unit(most: float, what: str) -> tuple[int, str]:
    """By how much whole places on an axis up to `most` are divided, and what it counts then: `million tokens`."""
    power = max((i for i in range(len(_THOUSANDS)) if most >= _FINE * 1000**i), default=0)
    return 1000**power, f"{_THOUSANDS[power]} {what}".lstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values from `low` to `high` to pixels from 0 to `pixels`."""

    low: float
    high: float
    pixels: float
    log: bool = False  # then `low` and `high` are above 0

    def __call__(self, value: float) -> float:
        """The pixel of a value; outside of the range too."""
        if self.log:
            value = max(value, self.low / 10)  # zero and less lie far below
            return self.pixels * log10(value / self.low) / log10(self.high / self.low)
        return self.pixels * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int, steps: Sequence[float] = (1, 2, 5), whole: bool = False) -> list[float]:
        """Round values in the range, about `most` of them at most.

        Args:
            most: Intervals between two ticks.
            steps: Allowed intervals, times powers of ten.
            whole: Whether all ticks are whole numbers.
        """
        if self.log:
            return self._decades(most)
        least = (self.high - self.low) / most * (1 - 1e-9)
        power = floor(log10(least))
        sizes = [(step * 10.0**each, each) for each in range(power, max(power, 0) + 2) for step in steps]
        size, power = next((s, p) for s, p in sizes if s >= least and (not whole or s.is_integer()))
        digits = max(0, 1 - power)
        first, last = ceil(self.low / size - 1e-9), floor(self.high / size + 1e-9)
        return [round(place * size, digits) for place in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: ceil(len(found) / most)]
