"""A loss that leaves its band and does not heal.

BLOOM-176B's spike (iterations 31215-31221) healed in about 30 steps. Such a spike is reported, and nothing is done.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier

_PATIENCE = 4
"""A spike that is on its way back is waited for, at most this many times `heal_steps`: by then waiting has cost as
much as the rollback would have (the rule that is never more than twice as dear as knowing beforehand)."""

_RESTLESS = 8
"""A loss that came back so often within 512 points is restless: how far it went is not out of its band any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeRule:
    """When a loss counts as out of its band, and when that calls for a rollback.

    The band ends at median + max(`deviations` · sd, `floor`), the lower of two: over the last `window` points, which
    notices a slow rise, and over the last `warm` points with the spread of what they leave unexplained, which follows a
    curve that still falls fast. sd is the interquartile range / 1.349, and points out of the band are not taken in: a
    spike does not widen its own band. `floor` keeps the band from shrinking below the noise between replicas of one
    run (about 0.055 nats at 15B).

    `persist` of the last `of` points out of the band are a spike, where points are hardly ever out of it; where some
    are as a rule, as with losses of two kinds of data in turn, so many more that chance is no explanation. A spike is
    acted on when, over `heal_steps` steps (and at least `of` points, where only every k-th step is logged), two thirds
    of the points were out of the band and the loss is not on its way back.
    """

    window: int = 128
    warm: int = 32
    deviations: float = 4.0
    floor: float = 0.1
    persist: int = 3
    of: int = 5
    heal_steps: int = 50
    gnorm_deviations: float = 6.0


class _Unusual:
    """Whether points are out of the band oftener than they usually are: Page's cumulative sum of log-likelihood ratios
    of "nine of ten" against the share of the last 512 points.

    A run of points reaches `BOUND` by chance once in e¹² runs at most, whatever the share (Wald). Three of five reach
    it where the share is a thousandth, eight in a row where it is 15 %. What heals by itself counts as usual too: an
    alert that comes again and again becomes rarer.
    """

    BOUND = 12.0
    SPIKE = 0.9  # share of points out of the band in a spike
    LEAST, MOST = 0.002, 0.5  # usual shares between which the ratio is meant
    MEMORY = 512

    def __init__(self, share: float, points: int) -> None:
        self.share = share
        self._points = points
        self._begin()

    def _begin(self) -> None:
        self.sum, self._seen, self._high = 0.0, 0, 0

    def observe(self, out: bool) -> None:
        """Take in the next point."""
        usual = min(self.MOST, max(self.LEAST, self.share))
        ratio = self.SPIKE / usual if out else (1 - self.SPIKE) / (1 - usual)
        self._seen, self._high = self._seen + 1, self._high + out
        self.sum = min(self.BOUND, self.sum + math.log(ratio))
        if self.sum <= 0:  # the run is over, and was usual
            self._points = min(self.MEMORY, self._points + self._seen)
            self.share += (self._high - self._seen * self.share) / max(self._points, self._seen)
            self._begin()


class SpikeDetector:
    """The loss of one curve, held against a band of its last points."""

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self.onset: Point | None = None
        self._learn()

    def observe(self, point: Point, loss: float, normal: float | None) -> list[Finding]:
        """Take in the next line's loss; what it makes known. `normal` is the level that a return to is no fault."""
        if len(self._losses) < self._rule.warm:
            self._take_in(loss)
            return []
        self._points += 1
        band = self._limit(normal)
        limit = max(band, self._trend.median + self._usual_peak())
        excess = max(0.0, loss - limit)
        self._remember(loss, loss > band)
        self._recent.append((point, excess))
        if self._unusual is None:
            self._unusual = _Unusual(self._losses.share_above(band), len(self._losses))
        self._unusual.observe(excess > 0)
        if loss <= band:
            self._take_in(loss)
        if self.onset is None:
            return self._begins(point, loss, limit, self._unusual)
        if len(self._recent) == self._rule.of and not any(over for _, over in self._recent):
            self.onset = None
            self._remember(loss, False)
            return []
        return self._goes_on(point, loss, limit, excess)

    def unhealed(self, point: Point) -> Finding | None:
        """A call for action on the spike that is open at `point`, if it was not acted on yet: it gets no more time."""
        out = sum(excess > 0 for _, excess in self._recent)
        if self.onset is None or self._acted or 2 * out <= len(self._recent):
            return None
        limit = (point.loss or 0.0) - self._recent[-1][1]
        return self._finding(Tier.ACT, point, point.loss or 0.0, limit, "out of the band at the last step of the run")

    def answered(self) -> None:
        """Something else called for action on what is going on."""
        self._acted = True

    def _learn(self) -> None:
        self._losses = RobustWindow(self._rule.window)
        self._trend = RobustWindow(self._rule.warm)
        self._residuals = RobustWindow(self._rule.window)
        self._recent: deque[tuple[Point, float]] = deque(maxlen=self._rule.of)  # with the excess, 0 in the band
        self._unusual: _Unusual | None = None
        self._came_back: deque[tuple[int, float]] = deque(maxlen=_RESTLESS)  # at which point, from which height
        self._out, self._peak, self._points = 0, 0.0, 0
        self._acted = False

    def _begins(self, point: Point, loss: float, limit: float, unusual: _Unusual) -> list[Finding]:
        rule = self._rule
        high = [seen for seen, excess in self._recent if excess > 0]
        if len(high) < rule.persist or unusual.sum < unusual.BOUND:
            return []
        self.onset, self._acted = high[0], False
        self._since, self._seen, self._high = high[0].step, len(self._recent), len(high)
        self._waited = 0
        self._early = RobustWindow(rule.heal_steps)
        for seen, _ in self._recent:
            if seen.step >= self._since:
                self._early.add(self._height(seen))
        text = f"{len(high)} of {rule.of} points out of the band, where {unusual.share:.1%} usually are"
        return [self._finding(Tier.ALERT, point, loss, limit, text)]

    def _goes_on(self, point: Point, loss: float, limit: float, excess: float) -> list[Finding]:
        rule = self._rule
        self._seen += 1
        self._high += excess > 0
        if self._acted:
            if self._high > rule.window:  # what nobody went back from is the new normal
                self.onset = None
                self._learn()
            return []
        if 2 * (point.step - self._since) < rule.heal_steps:
            self._early.add(self._height(point))
        if point.step - self._since < rule.heal_steps or self._seen < rule.of or not excess:
            return []
        self._waited += 1
        now = sorted(self._height(seen) for seen, _ in self._recent)[len(self._recent) // 2]
        bound = limit - self._trend.median
        if 3 * self._high >= 2 * self._seen and now > bound and not self._heals(now, bound):
            self._acted = True
            steps = point.step - self.onset.step if self.onset else 0
            return [self._finding(Tier.ACT, point, loss, limit, f"out of the band and not healed in {steps} steps")]
        self._since, self._seen, self._high = point.step, 0, 0
        self._early = RobustWindow(rule.heal_steps)
        self._early.add(now)
        return []

    def _remember(self, loss: float, out: bool) -> None:
        """How high the loss was before it came back, of two points or more out of the band."""
        if out:
            self._out, self._peak = self._out + 1, max(self._peak, loss - self._trend.median)
        elif self.onset is None:
            if self._out >= 2:
                self._came_back.append((self._points, self._peak))
            self._out, self._peak = 0, 0.0

    def _usual_peak(self) -> float:
        """How far from the median a restless loss is by itself, from which it comes back; 0 if it is not restless."""
        back = self._came_back
        if len(back) < _RESTLESS or self._points - back[0][0] > _Unusual.MEMORY:
            return 0.0
        return max(height for _, height in back)

    def _height(self, point: Point) -> float:
        return (point.loss or 0.0) - self._trend.median

    def _heals(self, now: float, bound: float) -> bool:
        """Whether the height over the median is two thirds, at most, of what it was in the first half of these steps (a
        peak of a few points says nothing), and at that pace, twice in `heal_steps`, is in the band in time."""
        left, pace = _PATIENCE - self._waited, now / self._early.median
        return left > 0 and 0 < pace <= 2 / 3 and now * pace ** (2 * left) <= bound

    def _take_in(self, loss: float) -> None:
        if len(self._trend):
            self._residuals.add(loss - self._trend.median)
        self._trend.add(loss)
        self._losses.add(loss)

    def _limit(self, normal: float | None) -> float:
        """The band's end. A loss that is too low takes the band down with it, but not what counts as `normal`."""
        rule, least = self._rule, -math.inf if normal is None else normal
        slow = max(self._losses.median, least) + max(rule.deviations * self._losses.sd, rule.floor)
        fast = max(self._trend.median, least) + max(rule.deviations * self._residuals.sd, rule.floor)
        return min(slow, fast)

    def _finding(self, tier: Tier, point: Point, loss: float, limit: float, rule: str) -> Finding:
        onset = self.onset or point
        return Finding(
            signal=FailureClass.LOSS_SPIKE,
            tier=tier,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule=rule,
            evidence={
                "loss": loss,
                "median": self._trend.median,
                "sd": self._residuals.sd,
                "limit": limit,
                "loss_at_onset": onset.loss,
                "gnorm": point.gnorm,
                "lr": point.lr,
            },
        )
