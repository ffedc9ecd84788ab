"""The best level that a curve has reached; no progress; and a fall that is too good to be true.

A slow rise carries every moving band with it. What was reached once is not forgotten, and what the evidence counts
against the run is not learned.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.noise import SCALES, Scale
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier

_BIAS = 3.0  # standard errors by which the best of some hundred noisy levels is too low by itself
_EVERY = 4  # points between two looks at the level; what is seen then is remembered
_LAGS = ((0, 16), (1, 64), (1, 256))  # which window's level is compared, and with how many points before
_USUAL = 4.0  # times the fall before: more is no learning
_REMEMBERED = 512  # points for which the level before a fall is remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """What the level tells.

    Attributes:
        settle: Points after a planned change in which the level is learned again.
        low: Standard errors of a fall that no schedule explains.
        low_sd: sd of single points that such a fall has, at least.
        low_stays: Points for which it must stay, before people are called.
        stall: Points without a better level, at least. Power laws improve visibly with every doubling of the steps, so
            half of all steps without one is a plateau.
    """

    settle: int = 128
    low: float = 8.0
    low_sd: float = 3.0
    low_stays: int = 64
    stall: int = 1000


@dataclass(frozen=True, slots=True)
class _Fall:
    """A loss that has become too low, and may come back."""

    onset: Point
    before: float
    depth: float
    text: str


class Level:
    """Medians of the last points, and the best of them."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._windows = tuple(RobustWindow(size) for size in SCALES)
        self._best = [float("inf")] * len(SCALES)
        self.points = self.low_step = 0
        """How many it has seen, and the last step at which the level was as good as the best."""
        self._last: deque[Point] = deque(maxlen=_LAGS[-1][1])
        self._history: tuple[deque[float], ...] = tuple(deque(maxlen=2 * _LAGS[-1][1] // _EVERY + 1) for _ in range(2))
        self._stall_level, self._stall_step, self._stall_points, self._stalled = float("inf"), 0, 0, False
        self._marks: deque[tuple[int, float]] = deque(maxlen=64)  # levels, so far apart that steps grow by a tenth
        self._fall: _Fall | None = None
        self._fell_at = self._forget_at = 0
        self._paged = False

    def _which(self) -> int:
        """The level must have been held for some share of the curve, from 8 to 128 points."""
        return sum(self.points >= 8 * size for size in SCALES[1:])

    @property
    def best(self) -> float:
        """The best level that was held; before a fall that is too good to be true."""
        return self._fall.before if self._fall is not None else self._best[self._which()]

    def bound(self, scale: Scale) -> float:
        """What a level that is as good as the best lies below: the best, and what chance takes from a best."""
        return self.best + _BIAS * scale.errors[self._which()]

    @property
    def now(self) -> float:
        """The level of the last points."""
        return self._windows[0].median

    @property
    def known(self) -> bool:
        """Whether a best level is known."""
        return self._best[0] < float("inf")

    def forget_best(self) -> None:
        """From here on, the best is learned again."""
        self._best = [float("inf")] * len(SCALES)
        self._windows = tuple(RobustWindow(size) for size in SCALES)

    def observe(self, point: Point, loss: float, scale: Scale | None, calm: bool) -> list[Finding]:
        """Take in the next point; what it makes known. Not `calm`: the evidence counts this point against the run."""
        self.points += 1
        if self.points == 1:
            self._stall_step = self.low_step = point.step  # a level that is learned anew knows nothing of earlier steps
        self._last.append(point)
        for which, (size, window) in enumerate(zip(SCALES, self._windows, strict=True)):
            window.add(loss)
            if len(window) == size and self._fall is None:
                self._best[which] = min(self._best[which], window.median)
        if scale is None or self.points % _EVERY:
            return []
        which = self._which()
        if calm and self._windows[which].median <= self._best[which] + scale.errors[which]:
            self.low_step = self._last[-min(len(self._last), SCALES[which] // 2)].step
        found = self._too_low(point, scale)
        if not calm:
            for history in self._history:
                history.clear()
        elif self._fall is None:
            for window, history in zip(self._windows, self._history, strict=False):
                history.append(min(window.median, history[-1]) if history else window.median)
        return [*found, *self._plateau(point, scale)] if calm else found

    def _plateau(self, point: Point, scale: Scale) -> list[Finding]:
        """Half of all steps without a better level. It takes `stall` points too, unless the doubling of steps before
        brought so much that a third of it would be seen."""
        which, error = self._which(), scale.errors[self._which()]
        level = self._windows[which].median
        if self.points < 2 * SCALES[0]:
            return []
        if not self._marks or point.step > 1.1 * self._marks[-1][0]:
            self._marks.append((point.step, level))
        if level < self._stall_level - 4 * error:
            self._stall_level, self._stall_step, self._stall_points = level, point.step, self.points
            self._stalled = False
        stalled, since = point.step - self._stall_step, self.points - self._stall_points
        if self._stalled or since < SCALES[-1] or 2 * stalled < point.step:
            return []
        before = next((seen for step, seen in reversed(self._marks) if 2 * step <= self._stall_step), self._stall_level)
        if before - self._stall_level < 12 * error and since < self._rule.stall:
            return []
        self._stalled = True
        evidence = {"level": level, "best": self._stall_level, "since": self._stall_step, "lr": point.lr}
        text = f"no better level in {stalled} steps"
        return [_finding(AlertSignal.LOSS_PLATEAU, Tier.ALERT, point, self._last[0], text, evidence)]

    def _too_low(self, point: Point, scale: Scale) -> list[Finding]:
        if self._fall is not None:
            return self._stays_low(point, self._fall)
        for which, lag in _LAGS:
            history, back = self._history[which], lag // _EVERY
            if len(history) < 2 * back:
                break
            level, before = self._windows[which].median, history[-back]
            usual = max(0.0, history[-2 * back] - before)
            fall, error = before - level, scale.errors[which]
            if fall > max(self._rule.low * error, self._rule.low_sd * scale.sd * scale.spread, _USUAL * usual):
                onset = self._last[-min(lag, len(self._last))]
                text = (
                    f"fell by {fall:.3g} within {lag} points, {fall / error:.0f} standard errors; no such pace before"
                )
                self._fall = _Fall(onset, before, fall, text)
                self._fell_at, self._paged = self.points, False
                self._forget_at = self.points + _REMEMBERED
                for each in self._history:
                    each.clear()
                return [self._low(Tier.ALERT, point, self._fall)]
        return []

    def _stays_low(self, point: Point, fall: _Fall) -> list[Finding]:
        """A loss that comes back was a batch or two; one that does not is not of the data that was meant."""
        back = fall.before - self.now <= fall.depth / 2
        if back:
            self._forget_at = min(self._forget_at, self.points + 2 * SCALES[1])
        if self.points >= self._forget_at:
            self._fall = None
            if back:
                self._best = [fall.before] * len(SCALES)
        if back or self._paged or self.points - self._fell_at < self._rule.low_stays:
            return []
        self._paged = True
        return [self._low(Tier.ACT, point, replace(fall, text=f"{fall.text}; it stays there"))]

    def _low(self, tier: Tier, point: Point, fall: _Fall) -> Finding:
        evidence = {"loss": point.loss, "level": self.now, "before": fall.before}
        return _finding(FailureClass.LOSS_TOO_LOW, tier, point, fall.onset, fall.text, evidence)


def _finding(
    signal: FailureClass | AlertSignal,
    tier: Tier,
    point: Point,
    onset: Point,
    rule: str,
    evidence: dict[str, float | None],
) -> Finding:
    return Finding(
        signal=signal, tier=tier, step=point.step, onset_step=onset.step, at=onset.ts, rule=rule, evidence=evidence
    )
