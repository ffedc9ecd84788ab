"""Activations that grow."""

from __future__ import annotations

from collections import deque

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier


class ActivationDetector:
    """Activations that grow by half within 512 points: OPT-175B's 12.43 and 12.45.2 were ended by such a drift.

    They grow in healthy runs too, over tens of thousands of steps, and fast while the learning rate warms up: the first
    1024 points only teach what is usual. The scale does not matter, only ratios do.
    """

    WIDTH = 64
    BACK = 512
    RATIO = 1.5
    WARM = 1024

    def __init__(self) -> None:
        self._window = RobustWindow(self.WIDTH)
        self._levels: deque[tuple[Point, float]] = deque(maxlen=self.BACK // self.WIDTH)
        self._seen = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.actv_norm is None:
            return []
        self._seen += 1
        self._window.add(point.actv_norm)
        if self._seen % self.WIDTH:
            return []
        now = self._window.median
        lowest = min(self._levels, key=lambda each: each[1], default=(point, now))
        self._levels.append((point, now))
        if self._seen <= self.WARM or now <= self.RATIO * lowest[1]:
            return []
        self._levels.clear()
        return [
            Finding(
                signal=AlertSignal.ACTIVATION_NORM,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=lowest[0].step,
                at=lowest[0].ts,
                rule=f"median of {self.WIDTH} points above {self.RATIO:g} times its lowest in {self.BACK} points",
                evidence={"actv_norm": now, "lowest": lowest[1], "loss": point.loss, "gnorm": point.gnorm},
            )
        ]
