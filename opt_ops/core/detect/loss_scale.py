"""fp16's loss scale: it recovers no more, or it falls."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleRule:
    """When fp16's loss scale recovers no more; or is on its way there: `fall` times lower than `within` points ago.

    Overflows are counted up, and updates that were finite count down, `refill` of them for one overflow; a doubling
    ends the count. So it does not matter where a scaler stops: at 2^-5, at 2^-3 or at 1. With 16 `overflows` a scale
    has lost 2^16. A healthy scale is halved once and doubled again, every thousand or two steps; BigScience's 104B
    fell from 2^20 to 2^15 within seven. OPT-175B was restarted from checkpoints whose loss scale was still at or above
    1 (arXiv 2205.01068, section 2.5): where nothing tells which updates overflowed, each line at 1 or below counts as
    one. A run's first `warm` points look for their scale from above: halvings do not count there.
    """

    overflows: int = 16
    refill: int = 16
    fall: float = 16.0
    within: int = 20
    warm: int = 100


_LOW = 1.0


class LossScaleDetector:
    """The loss scale of fp16 that recovers no more, or falls."""

    def __init__(self, rule: LossScaleRule) -> None:
        self._rule = rule
        self._count = 0.0
        self._onset: Point | None = None
        self._told = False
        self._marked = self._was_over = False  # whether lines say that they overflowed; whether the last one did
        self._before: float | None = None
        self._last_step: int | None = None
        self._interval = 1
        self._seen = 0
        self._last: deque[tuple[Point, float]] = deque(maxlen=rule.within)

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.loss_scale is None or point.loss_scale <= 0:
            return []
        self._seen += 1
        if self._last_step is not None and point.step > self._last_step:
            self._interval = point.step - self._last_step
        self._last_step = point.step
        return [*self._recovers_no_more(point, point.loss_scale), *self._falling(point, point.loss_scale)]

    def _recovers_no_more(self, point: Point, scale: float) -> list[Finding]:
        before, self._before = self._before, scale
        if before is not None and scale > before:
            self._count, self._onset, self._told, self._was_over = 0.0, None, False, False
        halvings = math.log2(before / scale) if before is not None and scale < before else 0.0
        over = point.skip == "overflow"
        self._marked = self._marked or over
        if halvings and self._seen <= self._rule.warm:
            self._count, self._onset, halvings = 0.0, None, 0.0
        overflows = max(float(over), halvings - self._was_over)
        if not self._marked and scale <= _LOW:
            overflows = max(overflows, 1.0)
        self._was_over = over
        if overflows > 0:
            self._onset = self._onset or point
            self._count = min(2.0 * self._rule.overflows, self._count + overflows)
        else:
            self._count -= 1 / self._rule.refill
        if self._count <= 0:
            self._count, self._onset, self._told = 0.0, None, False
        if self._told or self._onset is None or self._count < self._rule.overflows:
            return []
        self._told = True
        onset = self._onset
        return [
            Finding(
                signal=FailureClass.LOSS_SCALE_FLOOR,
                tier=Tier.ACT,
                step=point.step,
                onset_step=onset.step,
                at=onset.ts,
                rule=f"{self._count:.0f} overflows without a doubling of the loss scale since step {onset.step}",
                evidence={"loss_scale": scale, "floor": scale, "at_onset": onset.loss_scale, "loss": point.loss},
                margin_steps=3 * self._interval,
            )
        ]

    def _falling(self, point: Point, scale: float) -> list[Finding]:
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
