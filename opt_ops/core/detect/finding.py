"""What a detector reports, and the window of values that most of them look at."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a detector found, still without its attempt.

    `margin_steps` is the uncertainty of the onset, and several logging intervals: a rollback goes back to at least this
    many steps before the onset.
    """

    signal: FailureClass | AlertSignal
    tier: Tier
    step: int
    onset_step: int
    at: float
    rule: str
    evidence: Mapping[str, Any]
    margin_steps: int = 0


class RobustWindow:
    """Median and spread of the last `size` values; insertion costs one bisection and a short move."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """Take in a value; the oldest leaves when the window is full."""
        if len(self._order) == self._size:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """The upper median."""
        return self._sorted[len(self._sorted) // 2]

    def share_above(self, value: float) -> float:
        """How many of the values lie above this one."""
        return 1.0 - bisect_right(self._sorted, value) / len(self._sorted)

    @property
    def largest(self) -> float:
        """The largest value."""
        return self._sorted[-1]

    def quantile(self, share: float) -> float:
        """The value below which this share of the values lies."""
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]

    @property
    def sd(self) -> float:
        """Interquartile range / 1.349: the standard deviation of a normal distribution with that range."""
        n = len(self._sorted)
        return (self._sorted[(3 * n) // 4] - self._sorted[n // 4]) / 1.349
