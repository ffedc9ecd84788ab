"""Findings that a trainer's own line tells: skipped and NaN iterations, and a loss that is left out of the line."""

from __future__ import annotations

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.values import Tier
from opt_ops.watch_job.reading import Reading

_CLEAN_LINES = 64  # until the same is told again


class OwnWords:
    """What the trainer counts itself, as Megatron does. Each kind is told once, until it was absent for 64 lines."""

    def __init__(self) -> None:
        self._clean = {"nan": _CLEAN_LINES, "skipped": _CLEAN_LINES}

    def take(self, reading: Reading, point: Point) -> list[Finding]:
        """Take in a line; what it makes known. A loss that is not finite is the loss detector's."""
        found: list[Finding] = []
        nan, skipped = reading.nan_updates, reading.skipped_updates
        if self._is_new("nan", nan > 0) and point.finite:
            rule = f"the trainer counts {nan} NaN iterations since the line before, and leaves them out of the loss"
            found.append(_finding(FailureClass.NON_FINITE_LOSS, Tier.ACT, point, rule, nan))
        if self._is_new("skipped", skipped > 0):
            scaled = reading.loss_scale is not None and reading.loss_scale != 1.0
            signal = AlertSignal.LOSS_SCALE_FALLING if scaled else FailureClass.NON_FINITE_LOSS
            rule = f"the trainer skipped {skipped} iterations since the line before: their gradients were not finite"
            found.append(_finding(signal, Tier.ALERT, point, rule, skipped))
        return found

    def _is_new(self, kind: str, there: bool) -> bool:
        clean = self._clean[kind]
        self._clean[kind] = 0 if there else clean + 1
        return there and clean >= _CLEAN_LINES


def _finding(signal: FailureClass | AlertSignal, tier: Tier, point: Point, rule: str, count: int) -> Finding:
    return Finding(
        signal=signal,
        tier=tier,
        step=point.step,
        onset_step=point.step,
        at=point.ts,
        rule=rule,
        evidence={"iterations": count, "gnorm": point.gnorm, "lr": point.lr},
    )
