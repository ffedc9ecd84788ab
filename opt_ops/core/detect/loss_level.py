"""The loss on the scale of hundreds of points: a slow rise, no progress, and a fall that is too good to be true.

A slow rise carries the band of `spike` with it. Here the median of the last points is held against the lowest it has
ever been: what was reached once is not forgotten.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier

_MEDIAN_ERROR = 1.2533  # standard error of a median / (sd / √n), normal noise
_PATIENCE = 4  # times `persist` that a rise on its way back is waited for
_RESTLESS, _RESTLESS_POINTS = 2, 4096  # rises that came back by themselves, and within how many points
_LR_RAISED = 1.25  # a learning rate this much above the one of the best level explains some rise
_RAISED_FACTOR = 3.0  # so much more is asked for then
_LAG = 16  # points that a sudden fall must hold
_EVERY = 8  # points between two that are remembered for that
_SLOW = 4  # times `width`, over which a fall that is not sudden is looked for too


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """The level is the median of the last `width` points.

    Attributes:
        rise: Nats above the best level, at least, that count: about three times what replicas of one run differ by.
        errors: Standard errors of the level above the best, at least. The best of thousands of noisy levels is about
            3.5 errors too low by itself.
        persist: Points in a row above both before it is acted on.
        low: Nats of a fall within `width` points, or four times as many, that no schedule explains.
        stall: Points without a better level, at least. Power laws improve visibly with every doubling of the steps, so
            half of all steps without one is a plateau.
    """

    width: int = 64
    rise: float = 0.15
    errors: float = 8.0
    persist: int = 64
    low: float = 0.4
    stall: int = 1000


@dataclass(frozen=True, slots=True)
class _Fall:
    """A loss that has become too low, and may come back."""

    onset: Point
    before: float
    depth: float
    text: str


class LevelDetector:
    """Drift, plateau and too low a loss, of one curve in step order."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._window = RobustWindow(rule.width)
        self._last: deque[Point] = deque(maxlen=rule.width)
        self._short = RobustWindow(_LAG)
        self._bests: deque[float] = deque(maxlen=2 * _SLOW * rule.width // _EVERY + 1)  # the best level until then
        self._calm_from = 0
        self._mark: float | None = None
        self._changes = RobustWindow(32)  # of the level, from width to width: what noise that is not white leaves
        self._points = 0
        self._best, self._best_lr, self._best_sd = float("inf"), 0.0, 0.0
        self._low_step: Point | None = None
        self._came_back: deque[tuple[int, float]] = deque(maxlen=4)
        self._above = 0
        self._peak = 0.0
        self._acted = False
        self._stall_level, self._stall_from, self._stall_points = float("inf"), 0, 0
        self._stalled = False
        self._fall: _Fall | None = None
        self._fell_at = self._forget_at = 0
        self._paged = False

    @property
    def risen(self) -> bool:
        """Whether the level has been out of its bounds for a while."""
        return self._above >= self._rule.persist // 4

    def restarted(self) -> LevelDetector:
        """One that begins after something that was acted on."""
        return LevelDetector(self._rule)

    @property
    def normal(self) -> float | None:
        """The level before a fall that is too good to be true, while it is remembered: a return to it is no fault."""
        return self._fall.before if self._fall is not None else None

    def spiked(self) -> None:
        """The loss is out of its band: it falls again when the spike heals, and nothing is learned from that."""
        self._bests.clear()
        self._calm_from = self._points + self._rule.width

    def observe(self, point: Point, loss: float) -> list[Finding]:
        """Take in the next point's loss, in nats; what it makes known."""
        rule = self._rule
        self._points += 1
        self._window.add(loss)
        self._short.add(loss)
        self._last.append(point)
        if len(self._window) < rule.width:
            return []
        level = self._window.median
        if self._points % rule.width == 0:
            if self._mark is not None:
                self._changes.add(level - self._mark)
            self._mark = level
        found = [*self._drift(point, level), *self._plateau(point, level)]
        if self._points % _EVERY == 0 and self._points >= self._calm_from and self._fall is None:
            self._bests.append(min(level, self._best))
        return [*found, *self._too_low(point)]

    def _error(self, sd: float) -> float:
        return _MEDIAN_ERROR * sd / self._rule.width**0.5

    def _drift(self, point: Point, level: float) -> list[Finding]:
        rule, middle = self._rule, self._last[self._rule.width // 2]
        if level < self._best and self._fall is None:
            self._best, self._best_lr, self._best_sd = level, point.lr, self._window.sd
        uneven = 4 * self._changes.sd if len(self._changes) >= 8 else 0.0
        bound = max(rule.rise, rule.errors * self._error(max(self._best_sd, self._window.sd)), uneven)
        if point.lr > _LR_RAISED * self._best_lr:
            bound *= _RAISED_FACTOR
        bound = max(bound, self._usual_rise())
        if self._above > 2 * _PATIENCE * rule.persist:  # what nobody went back from is the new normal
            self._best = level
        rise = level - self._best
        if rise <= bound / 4:
            self._low_step = middle
        if rise <= bound:
            if self.risen and not self._acted:
                self._came_back.append((self._points, self._peak))
            self._above, self._peak, self._acted = 0, 0.0, False
            return []
        self._above += 1
        self._peak = max(self._peak, rise)
        onset = self._low_step or middle
        evidence = {"loss": point.loss, "level": level, "best": self._best, "bound": bound, "lr": point.lr}
        text = f"the median of {rule.width} points is {bound:.2f} above its best"
        if self._above == rule.persist // 4:
            return [self._finding(FailureClass.LOSS_DRIFT, Tier.ALERT, point, onset, text, evidence)]
        stays = rise > self._peak / 2 or self._above >= _PATIENCE * rule.persist
        if self._acted or self._above < rule.persist or not stays:
            return []
        self._acted = True
        return [
            self._finding(
                FailureClass.LOSS_DRIFT, Tier.ACT, point, onset, f"{text}, for {self._above} points", evidence
            ),
        ]

    def _usual_rise(self) -> float:
        """What a restless level rises by and comes back from, and half as much again; 0 if it is not restless.

        Twice within 4096 points: data that is not well mixed, in blocks.
        """
        back = self._came_back
        if len(back) < _RESTLESS or self._points - back[-_RESTLESS][0] > _RESTLESS_POINTS:
            return 0.0
        return 1.5 * max(peak for _, peak in back)

    def _plateau(self, point: Point, level: float) -> list[Finding]:
        rule = self._rule
        if level < self._stall_level - 2 * self._error(self._window.sd):
            self._stall_level, self._stall_from, self._stall_points = level, point.step, self._points
            self._stalled = False
        stalled = point.step - self._stall_from
        if self._stalled or self._points - self._stall_points < rule.stall or stalled < point.step / 2:
            return []
        self._stalled = True
        onset = self._last[0]
        evidence = {"level": level, "best": self._stall_level, "since": self._stall_from, "lr": point.lr}
        return [
            self._finding(
                AlertSignal.LOSS_PLATEAU, Tier.ALERT, point, onset, f"no better level in {stalled} steps", evidence
            ),
        ]

    def _too_low(self, point: Point) -> list[Finding]:
        if self._fall is not None:
            return self._stays_low(point, self._fall)
        rule, bests = self._rule, self._bests
        for lag in (rule.width, _SLOW * rule.width):
            back = lag // _EVERY
            if len(bests) <= 2 * back:
                break
            before, usual = bests[-back], bests[-2 * back] - bests[-back]
            fall = before - self._short.median
            if fall > max(rule.low, 3 * self._best_sd, 4 * usual):
                onset = self._last[-_LAG // 2] if lag == rule.width else self._last[0]
                text = f"fell by {fall:.2f} within {lag} points, four times as much as before"
                self._fall, self._fell_at, self._paged = _Fall(onset, before, fall, text), self._points, False
                self._forget_at = self._points + 2 * _PATIENCE * rule.persist
                self._bests.clear()
                return [self._low(Tier.ALERT, point, self._fall)]
        return []

    def _stays_low(self, point: Point, fall: _Fall) -> list[Finding]:
        """A loss that comes back was a batch or two; one that does not is not of the data that was meant."""
        rule, since = self._rule, self._points - self._fell_at
        back = fall.before - self._short.median <= fall.depth / 2
        if back:
            self._forget_at = min(self._forget_at, self._points + 2 * rule.width)
        if self._points >= self._forget_at:
            self._fall = None
        if back or self._paged or since < rule.persist:
            return []
        self._paged = True
        return [self._low(Tier.ACT, point, replace(fall, text=f"{fall.text}, and stays there"))]

    def _low(self, tier: Tier, point: Point, fall: _Fall) -> Finding:
        evidence = {"loss": point.loss, "level": self._short.median, "before": fall.before}
        return self._finding(FailureClass.LOSS_TOO_LOW, tier, point, fall.onset, fall.text, evidence)

    @staticmethod
    def _finding(
        signal: FailureClass | AlertSignal,
        tier: Tier,
        point: Point,
        onset: Point,
        rule: str,
        evidence: dict[str, float | None],
    ) -> Finding:
        return Finding(
            signal=signal,
            tier=tier,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule=rule,
            evidence=evidence,
        )
