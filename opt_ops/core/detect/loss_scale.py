"""fp16's loss scale: at its floor, or falling to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleRule:
    """When fp16's loss scale is stuck: at or below the floor for `persist` points in a row; or on its way there: `fall`
    times lower than `within` points ago.

    OPT-175B was restarted from checkpoints whose loss scale was still at or above 1 (arXiv 2205.01068, section 2.5). A
    healthy scale is halved once and doubled again, every thousand or two steps; BigScience's 104B fell from 2^20 to
    2^15 within seven. A run's first `warm` points look for their scale from above.
    """

    floor: float = 0.03125  # 2^-5, metaseq's min_loss_scale
    persist: int = 10
    fall: float = 16.0
    within: int = 20
    warm: int = 100


class LossScaleDetector:
    """The loss scale of fp16 at its floor, or falling to it."""

    def __init__(self, rule: LossScaleRule) -> None:
        self._rule = rule
        self._since: Point | None = None
        self._steps = 0
        self._seen = 0
        self._last: deque[tuple[Point, float]] = deque(maxlen=rule.within)

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.loss_scale is None:
            self._steps = 0
            return []
        return [*self._at_floor(point, point.loss_scale), *self._falling(point, point.loss_scale)]

    def _at_floor(self, point: Point, scale: float) -> list[Finding]:
        if scale > self._rule.floor:
            self._steps = 0
            return []
        if self._steps == 0:
            self._since = point
        self._steps += 1
        if self._steps != self._rule.persist or self._since is None:
            return []
        return [
            Finding(
                signal=FailureClass.LOSS_SCALE_FLOOR,
                tier=Tier.ACT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=f"loss scale at its floor for {self._rule.persist} steps",
                evidence={"loss_scale": scale, "floor": self._rule.floor, "loss": point.loss},
            )
        ]

    def _falling(self, point: Point, scale: float) -> list[Finding]:
        self._seen += 1
        self._last.append((point, scale))
        if self._seen <= self._rule.warm:
            return []
        highest = max(self._last, key=lambda each: (each[1], each[0].step))
        if scale * self._rule.fall > highest[1]:
            return []
        self._last.clear()  # told once for each time that it falls so far
        return [
            Finding(
                signal=AlertSignal.LOSS_SCALE_FALLING,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=highest[0].step,
                at=highest[0].ts,
                rule=f"loss scale {self._rule.fall:g} times lower within {self._rule.within} points",
                evidence={"loss_scale": scale, "before": highest[1], "loss": point.loss},
            )
        ]
