"""A gradient norm that leaves its band and rises; it leads the loss."""

from __future__ import annotations

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier

_GNORM_FLOOR = 0.5
"""The gradient norm's band ends no lower than this far above its median, relative: where clipping or rounding hides the
noise, its spread says nothing."""


class GradientNormDetector:
    """The gradient norm of one curve, held against its own band."""

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._window = RobustWindow(rule.window)
        self.out = 0  # points in a row out of the band
        self._rising = 0
        self._last: Point | None = None
        self._alerted_at: int | None = None

    def observe(self, point: Point, gnorm: float) -> list[Finding]:
        """Take in the next line's gradient norm; what it makes known."""
        rule, window, last = self._rule, self._window, self._last
        limit = float("inf")
        if len(window) >= rule.warm:
            limit = window.median + max(rule.gnorm_deviations * window.sd, _GNORM_FLOOR * window.median)
        rises = last is None or last.gnorm is None or gnorm > last.gnorm
        self._last = point
        self.out = self.out + 1 if gnorm > limit else 0
        self._rising = self._rising + 1 if self.out and rises else 0
        if self.out > rule.window:
            # A whole window out of the band while the loss is fine is the new normal, not a fault.
            self._window, self.out = RobustWindow(rule.window), 0
            return []
        if not self.out:
            window.add(gnorm)
            return []
        told = self._alerted_at is not None and point.step - self._alerted_at < rule.heal_steps
        if self._rising < 2 or told or last is None:
            return []
        self._alerted_at = point.step
        return [
            Finding(
                signal=AlertSignal.GRADIENT_NORM,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=last.step,
                at=point.ts,
                rule=f"above median + {rule.gnorm_deviations:g} sd and rising, two points in a row",
                evidence={"gnorm": gnorm, "median": window.median, "limit": limit, "loss": point.loss},
            )
        ]
