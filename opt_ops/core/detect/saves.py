"""Saves that fail, and what steps, saves and evaluations took."""

from __future__ import annotations

from statistics import median

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier


class StepTimes:
    """What the steps since the last account took: for the ledger, which divides the wall clock by it."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._saves = self._evaluations = 0.0

    def step(self, point: Point) -> None:
        """A step of an attempt that is not its first."""
        self._steps.append(max(0.0, point.step_seconds - point.save_seconds))
        self._saves += point.save_seconds

    def evaluation(self, seconds: float) -> None:
        """A scheduled evaluation."""
        self._evaluations += seconds

    def account(self) -> tuple[float | None, float, float]:
        """The median of a step without its saves, what saves held up, and evaluations, in seconds. Counts restart."""
        account = (median(self._steps) if self._steps else None, self._saves, self._evaluations)
        self._steps.clear()
        self._saves = self._evaluations = 0.0
        return account


class SaveDetector:
    """Saves that fail. Training goes on, but every step from here on can be lost."""

    def __init__(self) -> None:
        self._failing = False

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.save_error is None:
            self._failing = self._failing and point.save_seconds == 0.0
            return []
        if self._failing:
            return []
        self._failing = True
        return [
            Finding(
                signal=AlertSignal.SAVE_FAILED,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=point.step,
                at=point.ts,
                rule="the trainer says that a checkpoint could not be saved",
                evidence={"error": point.save_error},
            )
        ]
