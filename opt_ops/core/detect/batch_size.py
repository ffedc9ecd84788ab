"""The size of the batch that an update used, against the one that was asked for."""

from __future__ import annotations

from collections.abc import Collection

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier


class BatchSizeDetector:
    """Tells the first update of an attempt whose batch is not the one of its config.json. It tells it once an attempt.

    Only what left the asked size is reported: a trainer that never used it may state something else there. Where
    something was planned since, the size may have been.
    """

    def __init__(self, planned: Collection[int] = ()) -> None:
        """`planned`: the steps from which something was planned."""
        self.asked: int | None = None  # sequences of the global batch; None: not known
        self.planned = planned
        self._last: Point | None = None  # the last update that used the size asked for
        self._told = False

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.batch is None or self.asked is None or self._told:
            return []
        if point.batch == self.asked:
            self._last = point
            return []
        if self._last is None or any(self._last.step < step <= point.step for step in self.planned):
            return []
        self._told = True
        return [
            Finding(
                signal=FailureClass.UNDECLARED_CHANGE,
                tier=Tier.ACT,
                step=point.step,
                onset_step=point.step,
                at=point.ts,
                rule=f"the batch has {point.batch} sequences, and {self.asked} were asked for",
                evidence={"batch": point.batch, "asked": self.asked, "loss": point.loss, "lr": point.lr},
                # It may have changed at any update since the line before this one.
                margin_steps=point.step - self._last.step,
            )
        ]
