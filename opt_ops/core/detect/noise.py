"""The noise of one curve: of single points, and how far its level wanders by itself.

Every threshold on the loss is in these units, so none is in nats.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from opt_ops.core.detect.finding import RobustWindow

SCALES = (8, 32, 128)
"""Points of a block, over which the wandering of the level is measured."""

_CLIP = 4.0  # sd: no single point says more than this
_LEAST = 2e-4  # of the value: what is left of noise where values are logged with four digits
_UNKNOWN = 2.0  # times the factor of the shorter blocks, for blocks of which there are too few to measure it
_MEDIAN_ERROR = 1.2533  # standard error of a median / (sd / √n), normal noise
_MEMORY = 256.0  # points over which the share of odd points is learned


@dataclass(frozen=True, slots=True)
class Scale:
    """The noise as it was measured at some point.

    Attributes:
        sd: Of single points, robust.
        mean: Of the clipped points about their neighbours' median, in sd: above 0 where odd points lie above.
        spread: Of the same; above 1 where tails are heavy, or some of the data is of another kind.
        factors: By `SCALES`: how many times larger the variance of a block's mean is than if its points were
            independent; 1 or more.
    """

    sd: float
    mean: float
    spread: float
    factors: tuple[float, ...]
    errors: tuple[float, ...]
    """Standard errors of the medians of such blocks, in the unit of the curve."""

    def factor(self, points: int) -> float:
        """That of the largest block that is no longer than so many points."""
        return self.factors[sum(points >= size for size in SCALES[1:])]


class _Wander:
    """How far the means of blocks of `size` points lie from each other, the trend left out.

    Second differences of the means leave a linear trend out. A curve that falls ever more slowly makes them positive,
    so only the negative ones are used: blocks that lie above their neighbours. Normal noise has a quarter of them below
    -0.67 sd, and a tenth below -1.28 sd; the larger of the two counts, for data in rare blocks.
    """

    def __init__(self, size: int) -> None:
        self._size, self._n, self._sum = size, 0, 0.0
        self._means: deque[float] = deque(maxlen=3)
        self._bends = RobustWindow(24)
        self.sd = 0.0

    @property
    def known(self) -> bool:
        return len(self._bends) >= 4

    def add(self, value: float) -> None:
        self._n, self._sum = self._n + 1, self._sum + value
        if self._n < self._size:
            return
        self._means.append(self._sum / self._n)
        self._n, self._sum = 0, 0.0
        if len(self._means) == 3:
            first, middle, last = self._means
            self._bends.add(first - 2 * middle + last)
            if self.known:
                bends = self._bends
                self.sd = max(0.0, -bends.quantile(0.25) / 0.6745, -bends.quantile(0.1) / 1.2816) / 6**0.5


class Noise:
    """Learns from every point that it is given; robust, so that a fault of a few points does not matter."""

    def __init__(self) -> None:
        self._bends = RobustWindow(128)
        self._last: deque[float] = deque(maxlen=2)
        self._near = RobustWindow(8)
        self._wander = tuple(_Wander(size) for size in SCALES)
        self._digit = float("inf")
        self._mean, self._square, self._n = 0.0, 1.0, 0
        self._scale: Scale | None = None

    def add(self, value: float, calm: bool) -> None:
        """Take in the next value of the curve. Not `calm`: it is reported as trouble, and its scatter is not the usual
        one; its height is, if it heals."""
        last = self._last
        if last and (change := abs(value - last[-1])) > 0:
            self._digit = min(self._digit, change)
        if len(last) == 2 and calm:
            self._bends.add(value - 2 * last[1] + last[0])
        last.append(value)
        if self.known:
            middle, sd = self._near.median, self.measure().sd
            score = min(_CLIP, max(-_CLIP, (value - middle) / sd))
            self._n += 1
            share = max(1 / self._n, 1 / _MEMORY)
            self._mean += share * (score - self._mean)
            self._square += share * (score * score - self._square)
            for each in self._wander:
                each.add(middle + score * sd)
        self._near.add(value)

    @property
    def known(self) -> bool:
        """Whether there are points enough to say anything."""
        return len(self._bends) >= 6

    @property
    def sd(self) -> float:
        """Of single points, robust: from second differences, which a trend does not reach. At least half of the last
        digit."""
        digit = self._digit / 2 if self._digit < float("inf") else 0.0
        n = len(self._bends)
        return max(self._bends.sd / 6**0.5 * (1 + 4 / n), digit, _LEAST * abs(self._last[-1]))

    def measure(self) -> Scale:
        """The noise as it is known now; measured again every eighth point, once many are known."""
        if self._scale is not None and self._n % 8 and self._n > 64:
            return self._scale
        sd, mean, spread = self.sd, 0.0, 1.0
        if self._n >= 16:
            mean = max(0.0, self._mean)
            spread = max(1.0, max(0.0, self._square - self._mean * self._mean) ** 0.5)
        factors: list[float] = []
        errors: list[float] = []
        factor = 1.0
        for size, wander in zip(SCALES, self._wander, strict=True):
            factor = max(factor, size * (wander.sd / (sd * spread)) ** 2) if wander.known else _UNKNOWN * factor
            factors.append(factor)
            errors.append(_MEDIAN_ERROR * sd * spread * (factor / size) ** 0.5)
        self._scale = Scale(sd=sd, mean=mean, spread=spread, factors=tuple(factors), errors=tuple(errors))
        return self._scale
