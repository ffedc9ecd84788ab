"""The learning rate that the live optimizer used, against the one that was planned for that update."""

from __future__ import annotations

import math

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.schedule import PlannedLr, peak_of
from opt_ops.core.values import Tier

_TOLERANCE = 1e-4
"""Of the planned learning rate: telemetry may round to five digits, and so small a difference changes no loss."""
_TOLERANCE_OF_PEAK = 1e-6
"""Of the peak: where the schedule ends at zero."""


class LearningRateDetector:
    """Tells the first update of an attempt whose learning rate is not the planned one. It tells it once an attempt.

    It acts only if some earlier update was as planned. A trainer that never was may follow a schedule that its
    config.json cannot state; then a restart cures nothing, and the finding is an alert.
    """

    def __init__(self) -> None:
        self._plan: PlannedLr | None = None
        self._least = 0.0  # a difference that is none, where the schedule ends at zero
        self._followed = False  # whether any update of any attempt was as planned
        self._told = False
        self._before = 0  # the step before the next point

    def begin(self, plan: PlannedLr | None, start: int) -> None:
        """An attempt begins after step `start`, under `plan`; None: what was planned is not known."""
        self._before, self._told = start, False
        self.plan(plan)

    def plan(self, plan: PlannedLr | None) -> None:
        """The plan of the present attempt becomes known."""
        self._plan = plan
        self._least = _TOLERANCE_OF_PEAK * peak_of(plan.schedule) if plan is not None else 0.0

    def knows(self, point: Point) -> bool:
        """Whether it is known what was planned for this update."""
        return self._planned(point) is not None

    def follows(self, point: Point) -> bool:
        """Whether the learning rate of this update is known to be the planned one."""
        planned = self._planned(point)
        return planned is not None and math.isclose(point.lr, planned, rel_tol=_TOLERANCE, abs_tol=self._least)

    def _planned(self, point: Point) -> float | None:
        return self._plan.due(point.step, point.base_lr) if self._plan is not None else None

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        before, self._before = min(self._before, point.step - 1), point.step
        planned = self._planned(point)
        if planned is None:
            return []
        if self.follows(point):
            self._followed = self._followed or planned != 0.0  # zero may be anybody's first update
            return []
        if self._told:
            return []
        self._told = True
        return [
            Finding(
                signal=FailureClass.UNPLANNED_LR,
                tier=Tier.ACT if self._followed else Tier.ALERT,
                step=point.step,
                onset_step=point.step,
                at=point.ts,
                rule=f"the learning rate of an update is more than {_TOLERANCE:.2%} off the planned one",
                evidence={
                    "lr": point.lr,
                    "planned_lr": planned,
                    "ratio": point.lr / planned if planned else None,
                    "last_step_before": before,
                },
                # It may have left its schedule at any update since the line before this one.
                margin_steps=point.step - before,
            )
        ]
