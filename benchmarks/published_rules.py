"""Rules for loss and gradient norm that others have published, as functions from a curve to the steps where they sound.

docs/signals.md names their sources.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

from opt_ops.core.detect.point import Point

Curve = list[Point]
Rule = Callable[[Curve], Iterator[int]]
"""From a curve to the steps at which it sounds."""


def olmo(curve: Curve) -> Iterator[int]:
    """OLMo-core's SkipStepOptimizer: loss or gradient norm above mean + 6 sd of the last 128 (at least 64)."""
    series = (Moments(128), Moments(128))
    for each in curve:
        values = (each.loss or 1e9, each.gnorm or 1e9)
        if any(len(m.last) >= 64 and v > m.mean + 6 * m.sd for m, v in zip(series, values, strict=True)):
            yield each.step
        for moments, value in zip(series, values, strict=True):
            moments.add(value)


def foundry(curve: Curve) -> Iterator[int]:
    """llm-foundry's KillLossSpike: loss at least twice the running mean, five points in a row."""
    moments, row = Moments(max(100, len(curve) // 20)), 0
    for each in curve:
        loss = each.loss or 1e9
        row = row + 1 if len(moments.last) >= 100 and loss >= 2 * moments.mean else 0
        if row == 5:
            yield each.step
        moments.add(loss)


def metaseq(curve: Curve) -> Iterator[int]:
    """Metaseq's skip_spike with ratio 1.25 (off by default): loss / EWM of span 9, not updated on spikes."""
    mean: float | None = None
    for each in curve:
        loss = each.loss or 1e9
        if mean is not None and loss / mean > 1.25:
            yield each.step
        else:
            mean = loss if mean is None else 0.2 * loss + 0.8 * mean


def zclip(curve: Curve) -> Iterator[int]:
    """ZClip: gradient norm's z above 2.5, exponential mean and variance with 0.97, after 25 points."""
    mean, square = 0.0, 0.0
    first = [each.gnorm or 0.0 for each in curve[:25]]
    mean, square = sum(first) / 25, 0.0
    square = sum((g - mean) ** 2 for g in first) / 25
    for each in curve[25:]:
        gnorm, sd = each.gnorm or 0.0, math.sqrt(square) + 1e-6
        z = (gnorm - mean) / sd
        if z > 2.5:
            yield each.step
            gnorm = mean + 2.5 * 2.5 / z * sd
        square = 0.97 * square + 0.03 * (gnorm - mean) ** 2
        mean = 0.97 * mean + 0.03 * gnorm


class Moments:
    """Running mean and standard deviation of the last `size` values."""

    def __init__(self, size: int) -> None:
        self.last: deque[float] = deque()
        self._size, self._sum, self._squares = size, 0.0, 0.0

    def add(self, value: float) -> None:
        """Take in a value."""
        self.last.append(value)
        self._sum += value
        self._squares += value * value
        if len(self.last) > self._size:
            old = self.last.popleft()
            self._sum -= old
            self._squares -= old * old

    @property
    def mean(self) -> float:
        """Of what is there."""
        return self._sum / max(1, len(self.last))

    @property
    def sd(self) -> float:
        """Of what is there."""
        return math.sqrt(max(0.0, self._squares / max(1, len(self.last)) - self.mean**2))
