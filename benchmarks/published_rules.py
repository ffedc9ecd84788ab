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
        values = (math.inf if each.loss is None else each.loss, each.gnorm)
        known = [(m, v) for m, v in zip(series, values, strict=True) if v is not None]
        if any(len(m.last) >= 64 and v > m.mean + 6 * m.sd for m, v in known):
            yield each.step
        for moments, value in known:
            moments.add(min(value, 1e9))


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
    return _ewm(curve, 1.25)


def metaseq_double(curve: Curve) -> Iterator[int]:
    """The same with ratio 2."""
    return _ewm(curve, 2.0)


def _ewm(curve: Curve, ratio: float) -> Iterator[int]:
    mean: float | None = None
    for each in curve:
        loss = each.loss or 1e9
        if mean is not None and loss / mean > ratio:
            yield each.step
        else:
            mean = loss if mean is None else 0.2 * loss + 0.8 * mean


def byterobust(curve: Curve) -> Iterator[int]:
    """ByteRobust: loss or gradient norm at five times what it was, or not finite.

    It names no reference; here it is the mean of the last 128 points, after 16. One alarm for each excursion.
    """
    series, above = (Moments(128), Moments(128)), False
    for each in curve:
        values = (each.loss if each.finite else math.inf, each.gnorm)
        was, above = above, False
        for moments, value in zip(series, values, strict=True):
            if value is None:
                continue
            if value == math.inf or (len(moments.last) >= 16 and value >= 5 * moments.mean):
                above = True
            else:
                moments.add(value)
        if above and not was:
            yield each.step


def zclip(curve: Curve) -> Iterator[int]:
    """ZClip: gradient norm's z above 2.5, exponential mean and variance with 0.97, after 25 points."""
    known = [(each.step, each.gnorm) for each in curve if each.gnorm is not None]
    first = [gnorm for _, gnorm in known[:25]]
    mean = sum(first) / 25
    square = sum((g - mean) ** 2 for g in first) / 25
    for step, gnorm in known[25:]:
        sd = math.sqrt(square) + 1e-6
        z = (gnorm - mean) / sd
        if z > 2.5:
            yield step
        clipped = mean + 2.5 * 2.5 / z * sd if z > 2.5 else gnorm
        square = 0.97 * square + 0.03 * (clipped - mean) ** 2
        mean = 0.97 * mean + 0.03 * clipped


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
