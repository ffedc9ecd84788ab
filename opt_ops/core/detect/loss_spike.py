"""A rise of the loss that stays: the evidence for it, and whether it is on its way back.

BLOOM-176B's spike (iterations 31215-31221) healed in about 30 steps. Such a spike is reported, and nothing is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from opt_ops.core.detect.noise import SCALES, Scale
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass

_CLIP = 4.0  # sd: no single point says more than this, so that heavy tails cannot decide
_SLOW = 7000.0
"""A loss that comes back within some 250 points by a straight line falls by n/750 of its height between the medians of
the middle and the last third of n points. That is three times their error when n^1.5 is 7,000 times sd over height."""

_RESUMED = 1500.0  # the same for a rise that begins with an attempt
_GROWN = 16  # points after which growth is not the first side of a peak any more
_FAR_OUT = 6.0  # sd above the bound: plainly out of the noise
_STEEP = 4.0  # sd above the bound: a spike; less: a drift


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeRule:
    """When a rise of the loss is reported, and when it is acted on.

    The evidence is Page's cumulative sum, in units of log-likelihood: by chance it reaches E about once in e^E points.

    Attributes:
        alert: Evidence at which it is reported.
        act: Evidence at which it is acted on, if it does not come back.
        heal_steps: Steps that it gets to heal, at least.
        patience: Points for which a rise on its way back is waited for, at most.
        gnorm_deviations: sd above its median at which a gradient norm is out of its band.
    """

    alert: float = 12.0
    act: float = 24.0
    heal_steps: int = 50
    patience: int = 300
    gnorm_deviations: float = 6.0


class Verdict(Enum):
    """What is known of a rise."""

    OPEN = "too early to say"
    RETURNS = "it is on its way back"
    STAYS = "it stays"


class Rise:
    """The points since the evidence left zero, in order."""

    def __init__(self, rule: SpikeRule, point: Point, scale: Scale, *, resumed: bool) -> None:
        """`resumed`: it begins with an attempt, where what rises seldom heals."""
        self._rule = rule
        self.onset, self.scale = point, scale
        self._slow = _RESUMED if resumed else _SLOW
        self.sum = 0.0
        self.points = 0
        self._of_level = 0.0
        self.told = self.acted = self.grows = False
        self.kind = FailureClass.LOSS_SPIKE
        self.bound = 0.0
        self.since_act = 0
        self._heights: deque[float] = deque(maxlen=rule.patience)
        self._steps: deque[int] = deque(maxlen=rule.patience)
        self._next_look = self._margin = 0

    def add(self, point: Point, height: float, gnorm: float) -> None:
        """Take in a point that is so far above the bound, in the unit of the loss; `gnorm`: what its gradient norm
        says, in log-likelihood."""
        rule, scale = self._rule, self.scale
        score = min(_CLIP, max(1 - _CLIP, height / scale.sd))
        self.points += 1
        most = (rule.act + 8) * scale.factor(self.points)
        self.sum = min(most, self.sum + (score - scale.mean) / scale.spread - 0.5 + gnorm)
        self._heights.append(height)
        self._steps.append(point.step)
        self.since_act += self.acted
        if self.points % 4 == 0 and self.points >= SCALES[0]:
            self._of_level = self._level()

    @property
    def evidence(self) -> float:
        """Of loss and gradient norm together, in log-likelihood.

        Where single points hang together, each says little. Then the level of some says more, the lower quartile of
        their heights: half the square of it, in the standard errors of a median.
        """
        return max(self.sum / self.scale.factor(self.points), self._of_level)

    def _level(self) -> float:
        which = sum(self.points >= 2 * size for size in SCALES[1:])
        last = sorted(list(self._heights)[-SCALES[which] :])
        level = last[len(last) // 4 if which else 0]  # of eight, chance may put some into odd data
        return 0.5 * max(0.0, level / self.scale.errors[which]) ** 2

    @property
    def steps(self) -> Sequence[int]:
        """Of its last points."""
        return self._steps

    @property
    def height(self) -> float:
        """Median of the last points, above the bound."""
        return median(list(self._heights)[-5:])

    @property
    def healed(self) -> bool:
        """Whether the evidence is gone, or the last points are back below the bound."""
        back = self.told and self.kind == FailureClass.LOSS_SPIKE and median(list(self._heights)[-SCALES[0] :]) <= 0
        return self.sum <= 0 or back

    @property
    def steep(self) -> bool:
        """Whether it rose at once."""
        return self.points <= 16 and self.height > _STEEP * self.scale.sd * self.scale.spread

    def verdict(self) -> Verdict:
        """Whether there were steps and points enough to see it come back, and whether it does.

        A rise that still grows is not asked for more points. One that falls by more than the noise of the medians of
        its middle and its last third is waited for while, at this pace, it ends within `patience` points.
        """
        n, rule, sd = self.points, self._rule, self.scale.sd * self.scale.spread
        if n < max(5, self._next_look) or self._steps[-1] - self.onset.step < rule.heal_steps or self.height <= 0:
            return Verdict.OPEN
        self._next_look = n + max(1, n // 16)
        values = list(self._heights)
        third = max(2, len(values) // 3)
        middle, late = median(values[-2 * third : -third]), median(values[-third:])
        if n >= rule.patience or late <= 0:
            return Verdict.STAYS if late > 0 else Verdict.OPEN
        error = 1.25 * sd * (2 * self.scale.factor(third) / third) ** 0.5
        self.grows = n >= _GROWN and late - middle > 2 * error and self.height > middle
        needed = (self._slow * sd / max(late, 0.1 * sd)) ** (2 / 3)
        if not self.grows and n < min(needed, rule.patience):
            return Verdict.OPEN
        falls = middle - late
        if falls <= 2 * error:
            return Verdict.STAYS
        return Verdict.RETURNS if n + late * third / falls <= rule.patience else Verdict.STAYS

    def margin(self, interval: int, low_step: int) -> int:
        """Steps by which the onset may be too late, given the logging interval and when the level was last good.

        A jump shows from its first points: some logging intervals. What rises out of the noise began before it could be
        seen: a straight rise that is found after n points has begun up to 5 n before them, and one that doubles in some
        time has taken about as long. One that is far out of the noise within a few points had no time to begin long
        before: when the level was last at its best says nothing about it, as chance keeps levels above it for hundreds
        of steps.
        """
        values, sd, n = list(self._heights), self.scale.sd * self.scale.spread, len(self._heights)
        late = median(values[-max(min(4, n), n // 3) :])
        spans = 8 * interval
        if late < 3 * sd or median(values[:5]) < 0.6 * late:
            medians = [median(values[i - 4 : i + 1]) for i in range(4, n)]
            out = next((i for i, each in enumerate(medians, 4) if each > _FAR_OUT * sd), _GROWN)
            if out < _GROWN:
                spans += 5 * (self._steps[out] - self._steps[0])
            else:
                half = next((i for i, each in enumerate(medians, 4) if each >= late / 2), n - 1)
                seen = n - 1 if late < _FAR_OUT * sd else min(half + 4, n - 1)
                spans += max(5 * (self._steps[seen] - self._steps[0]), 2 * (self.onset.step - low_step))
        self._margin = max(self._margin, spans)
        return self._margin
