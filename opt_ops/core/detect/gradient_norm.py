"""A gradient norm that leaves its band and rises; it leads the loss."""

from __future__ import annotations

import math
from collections import deque

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier

_WINDOW, _WARM = 128, 16  # points
_LEAST = 0.08
"""sd of the logarithm, at least: where clipping or rounding hides the noise, its spread says nothing."""

_BACK, _SLOW = 64, 256  # points: what is usual is learned from those that are older, so that a slow rise shows
_MOST = 0.75
"""Log-likelihood that a point's norm adds, at most. A loss at its usual level loses more with each point, so the norm
alone never says anything."""


class GradientNormDetector:
    """The logarithm of the gradient norm of one curve, held against its own band."""

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._window = RobustWindow(_WINDOW)
        self._new: deque[float] = deque()
        self._usual = RobustWindow(_SLOW)
        self.out = 0  # points in a row out of the band
        self.evidence = 0.0
        """What the last point's norm says for a fault, in log-likelihood."""
        self._rising = 0
        self._last: Point | None = None
        self._alerted_at: int | None = None

    def observe(self, point: Point, gnorm: float, loss_is_up: bool) -> list[Finding]:
        """Take in the next line's gradient norm; what it makes known. While the loss is up, nothing is learned: a norm
        that merely stays high is no new normal then."""
        rule, window, last = self._rule, self._window, self._last
        value = math.log(max(gnorm, 1e-30))
        score = 0.0
        if len(window) >= _WARM:
            score = (value - window.median) / max(window.sd, _LEAST)
        self.evidence = self._for_a_fault(value) if len(window) >= _WARM else 0.0
        if not loss_is_up:
            self._new.append(value)
            if len(self._new) > _BACK:
                self._usual.add(self._new.popleft())
        rises = last is None or last.gnorm is None or gnorm > last.gnorm
        self._last = point
        self.out = self.out + 1 if score > rule.gnorm_deviations else 0
        self._rising = self._rising + 1 if self.out and rises else 0
        if not loss_is_up and self.out > _WINDOW:
            # A whole window out of the band while the loss is fine is the new normal, not a fault.
            self._window, self.out = RobustWindow(_WINDOW), 0
            return []
        if not self.out:
            if not loss_is_up:
                window.add(value)
            return []
        told = self._alerted_at is not None and point.step - self._alerted_at < rule.heal_steps
        if self._rising < 2 or told or last is None:
            return []
        self._alerted_at = point.step
        usual = math.exp(window.median)
        limit = math.exp(window.median + rule.gnorm_deviations * max(window.sd, _LEAST))
        return [
            Finding(
                signal=AlertSignal.GRADIENT_NORM,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=last.step,
                at=point.ts,
                rule=f"above median + {rule.gnorm_deviations:g} sd and rising, two points in a row",
                evidence={"gnorm": gnorm, "median": usual, "limit": limit, "loss": point.loss},
            )
        ]

    def _for_a_fault(self, value: float) -> float:
        usual = self._usual if len(self._usual) >= _WARM else self._window
        score = (value - usual.median) / max(self._window.sd, usual.sd, _LEAST)
        return min(_MOST, max(0.0, 0.5 * (score - 1.0)))
