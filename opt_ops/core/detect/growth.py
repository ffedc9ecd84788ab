"""A value that grows faster than it ever did by itself: the evidence is summed, in the run's own noise."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from opt_ops.core.detect.finding import RobustWindow
from opt_ops.core.detect.point import Point

_BLOCK = 8  # values, whose median is one measure of the level
_BLOCKS = 32  # that are remembered: they tell how the level moves by itself
_LEARN = 6  # blocks before anything is reported
_NEWEST = 4  # of the newest of them the level is made
_APART = 4  # blocks between two levels whose difference tells how far the level wanders by itself
_CLIP = 4.0  # sd: no single value says more than this
_ALLOWED = 1.0  # sd: so much above the level is no evidence
ENOUGH = 24.0
"""Evidence for an alert, in sd: eight values in a row at least. The margin is for tails and for levels that wander."""


_LONGEST = 256  # values: evidence that is open for so long is a new level
_BLOCKS_OF_MODEL = 512  # that are followed at most
_QUIET = 256  # values after a finding in which the same detector tells no other


class Growth:
    """Follows one value, in logarithms. `since` is where the evidence that is not yet enough began.

    The level is the median of the last blocks, continued by their usual change from block to block: slow growth is
    healthy. While evidence is open the level is frozen, and nothing is learned from what is counted against the run. A
    value below the level takes evidence away. If nothing is left, all of it was noise, and is learned as such.
    """

    def __init__(self, harmless: float = -math.inf) -> None:
        """Growth up to `harmless` is no evidence."""
        self._harmless = harmless
        self._near: deque[float] = deque(maxlen=_BLOCK)
        self._noise = RobustWindow(_BLOCK * _BLOCKS)
        self._block: list[float] = []
        self._levels: deque[float] = deque(maxlen=_BLOCKS)
        self._open: list[float] = []
        self._rate = 0.0  # the usual change of the level from block to block
        self._wander = 0.0  # the spread of its changes over `_APART` blocks
        self.evidence = 0.0
        self.since: Point | None = None

    @property
    def level(self) -> float:
        """What the next value should be about."""
        newest = list(self._levels)[-_NEWEST:]
        behind = (len(newest) + 1) / 2 + (len(self._block) + len(self._open)) / _BLOCK
        return max(self._harmless, median(newest) + behind * max(0.0, self._rate))

    @property
    def sd(self) -> float:
        """Of a value about the level: the noise of single values with its tail, and how far the level wanders."""
        noise = max(self._noise.sd, (self._noise.quantile(0.95) - self._noise.median) / 1.645)
        return math.hypot(noise, 2 * self._wander)

    def add(self, point: Point, value: float) -> float:
        """Take in the next value. Returns the evidence that the value grows."""
        if len(self._levels) < _LEARN:
            self._learn(value)
            return 0.0
        sd = self.sd
        score = (value - self.level) / sd if sd > 0 else 0.0
        self.evidence = max(0.0, self.evidence + min(_CLIP, max(-_CLIP, score)) - _ALLOWED)
        self._open.append(value)
        self.since = self.since or point
        if not self.evidence or len(self._open) >= _LONGEST:
            for each in self._open:
                self._learn(each)
            self._open.clear()
            self.since, self.evidence = None, 0.0
        return self.evidence

    def _learn(self, value: float) -> None:
        if self._near:
            self._noise.add(value - median(self._near))
        self._near.append(value)
        self._block.append(value)
        if len(self._block) == _BLOCK:
            self._levels.append(median(self._block))
            self._block.clear()
            levels = list(self._levels)
            self._rate = median(b - a for a, b in pairwise(levels)) if len(levels) > 1 else 0.0
            apart = [abs(b - a - _APART * self._rate) for a, b in zip(levels, levels[_APART:], strict=False)]
            self._wander = 1.4826 * median(apart) if apart else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """What grew: the block, where the evidence began, what was usual, and the newest value, both in logarithms."""

    block: str
    since: Point
    usual: float
    value: float
    enough: float


class Growths:
    """Follows one value of each block of the model, and tells which one grows."""

    def __init__(self, harmless: float = -math.inf) -> None:
        self._harmless = harmless
        self._by_block: dict[str, Growth] = {}
        self._quiet = 0  # values in which nothing is reported

    def observe(self, point: Point, values: Mapping[str, float]) -> Grown | None:
        """Take in the logarithms of a line, by block; what they make known."""
        if not values:
            return None
        self._quiet -= 1
        evidence: dict[str, float] = {}
        for block in list(values)[:_BLOCKS_OF_MODEL]:
            evidence[block] = self._by_block.setdefault(block, Growth(self._harmless)).add(point, values[block])
        block = max(evidence, key=lambda name: evidence[name])
        enough = ENOUGH + math.log(len(evidence))  # with more blocks, chance has more tries
        if evidence[block] < enough:
            return None
        growth, quiet = self._by_block[block], self._quiet > 0
        self._by_block = {name: each for name, each in self._by_block.items() if each.evidence < enough}  # learn again
        if quiet or growth.since is None:
            return None
        self._quiet = _QUIET
        return Grown(block=block, since=growth.since, usual=growth.level, value=values[block], enough=enough)
