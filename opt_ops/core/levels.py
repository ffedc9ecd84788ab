"""The loss on the scale of hundreds of points: a slow rise, no progress, and a fall that is too good to be true.

A slow rise carries the band of `spike` with it. Here the median of the last points is held against the lowest it has
ever been: what was reached once is not forgotten.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from opt_ops.core.signals import Finding, Point, RobustWindow
from opt_ops.core.values import Tier

_MEDIAN_ERROR = 1.2533  # standard error of a median / (sd / √n), normal noise
_PATIENCE = 4  # times `persist` that a rise on its way back is waited for
_LR_RAISED = 1.25  # a learning rate this much above the one of the best level explains some rise
_RAISED_FACTOR = 3.0  # so much more is asked for then
_LAG = 16  # points that a sudden fall must hold


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """The level is the median of the last `width` points.

    Attributes:
        rise: Nats above the best level, at least, that count: about three times what replicas of one run differ by.
        errors: Standard errors of the level above the best, at least. The best of thousands of noisy levels is about
            3.5 errors too low by itself.
        persist: Points in a row above both before it is acted on.
        low: Nats of a sudden fall that no schedule explains.
        stall: Points without a better level, at least. Power laws improve visibly with every doubling of the steps, so
            half of all steps without one is a plateau.
    """

    width: int = 64
    rise: float = 0.15
    errors: float = 8.0
    persist: int = 64
    low: float = 0.4
    stall: int = 1000


class LevelDetector:
    """Drift, plateau and too low a loss, of one curve in step order."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._window = RobustWindow(rule.width)
        self._last: deque[Point] = deque(maxlen=rule.width)
        self._short = RobustWindow(_LAG)
        self._levels: deque[float] = deque(maxlen=2 * rule.width + 1)
        self._changes = RobustWindow(32)  # of the level, from width to width: what noise that is not white leaves
        self._points = 0
        self._best, self._best_lr, self._best_sd = float("inf"), 0.0, 0.0
        self._low_step: Point | None = None
        self._above = 0
        self._peak = 0.0
        self._acted = False
        self._stall_level, self._stall_from, self._stall_points = float("inf"), 0, 0
        self._stalled = False
        self._fell_at = 0

    @property
    def risen(self) -> bool:
        """Whether the level has been out of its bounds for a while."""
        return self._above >= self._rule.persist // 4

    def anew(self) -> LevelDetector:
        """One that begins after something that was acted on."""
        return LevelDetector(self._rule)

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
        if self._points % rule.width == 0 and len(self._levels) > rule.width:
            self._changes.add(level - self._levels[-rule.width])
        self._levels.append(level)
        return [*self._drift(point, level), *self._plateau(point, level), *self._too_low(point)]

    def _error(self, sd: float) -> float:
        return _MEDIAN_ERROR * sd / self._rule.width**0.5

    def _drift(self, point: Point, level: float) -> list[Finding]:
        rule, middle = self._rule, self._last[self._rule.width // 2]
        if level < self._best:
            self._best, self._best_lr, self._best_sd = level, point.lr, self._window.sd
        uneven = 4 * self._changes.sd if len(self._changes) >= 8 else 0.0
        bound = max(rule.rise, rule.errors * self._error(max(self._best_sd, self._window.sd)), uneven)
        if point.lr > _LR_RAISED * self._best_lr:
            bound *= _RAISED_FACTOR
        if self._above > 2 * _PATIENCE * rule.persist:  # what nobody went back from is the new normal
            self._best = level
        rise = level - self._best
        if rise <= bound / 4:
            self._low_step = middle
        if rise <= bound:
            self._above, self._peak, self._acted = 0, 0.0, False
            return []
        self._above += 1
        self._peak = max(self._peak, rise)
        onset = self._low_step or middle
        evidence = {"loss": point.loss, "level": level, "best": self._best, "bound": bound, "lr": point.lr}
        text = f"the median of {rule.width} points is {bound:.2f} above its best"
        if self._above == rule.persist // 4:
            return [self._finding("loss_drift", Tier.ALERT, point, onset, text, evidence)]
        stays = rise > self._peak / 2 or self._above >= _PATIENCE * rule.persist
        if self._acted or self._above < rule.persist or not stays:
            return []
        self._acted = True
        return [
            self._finding("loss_drift", Tier.ACT, point, onset, f"{text}, for {self._above} points", evidence),
        ]

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
            self._finding("loss_plateau", Tier.ALERT, point, onset, f"no better level in {stalled} steps", evidence),
        ]

    def _too_low(self, point: Point) -> list[Finding]:
        rule, levels = self._rule, self._levels
        if len(levels) <= 2 * rule.width or self._points - self._fell_at < 2 * rule.width:
            return []
        before, usual = levels[-rule.width], levels[0] - levels[-rule.width]
        fall = before - self._short.median
        if fall <= max(rule.low, 3 * self._best_sd, 4 * usual):
            return []
        self._fell_at = self._points
        onset = self._last[-_LAG // 2]
        evidence = {"loss": point.loss, "level": self._short.median, "before": before, "usual_fall": usual}
        text = f"fell by {fall:.2f} within {rule.width} points, four times as much as before"
        return [self._finding("loss_too_low", Tier.ALERT, point, onset, text, evidence)]

    @staticmethod
    def _finding(
        signal: str, tier: Tier, point: Point, onset: Point, rule: str, evidence: dict[str, float | None]
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
