"""The learning rate and the batch that an update must have used: written here a second time on purpose.

The proof of a rollback compares the live optimizer with this. It would prove nothing if both sides shared one
implementation. The formula is the one of docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opt_ops.core.values import LINEAR, LrFactor, Schedule, Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLr:
    """The learning rates that a run was planned with."""

    schedule: Schedule
    factors: tuple[LrFactor, ...] = ()

    def at(self, step: int) -> float | None:
        """The planned learning rate of update `step`; None if the schedule is of a kind that is not known here."""
        return expected_lr(self.schedule, self.factors, step) if self.schedule.kind == LINEAR else None


def scheduled_lr(schedule: Schedule, step: int) -> float:
    """The schedule alone at update `step` (1 is the first): linear warm-up, then linear decay to the final fraction."""
    if step < schedule.warmup_steps:
        return schedule.peak_lr * step / schedule.warmup_steps
    span = schedule.total_steps - schedule.warmup_steps
    gone = min(max(step - schedule.warmup_steps, 0), span)
    return schedule.peak_lr * (1.0 - (1.0 - schedule.final_fraction) * (gone / span if span else 0.0))


def expected_lr(schedule: Schedule, factors: Iterable[LrFactor], step: int) -> float:
    """The schedule times every factor in force at update `step`."""
    lr = scheduled_lr(schedule, step)
    for factor in factors:
        if factor.step < step:
            lr *= factor.factor
    return lr


def batch_of(step: int, skips: Iterable[Skip]) -> int:
    """Which batch of the original order (1 is the first) update `step` trains on when some are left out."""
    batch, left_out_to = step, 0
    for skip in sorted(skips, key=lambda each: each.first):
        first = max(skip.first, left_out_to + 1)  # where windows overlap, a batch is left out once
        if batch < first:
            break
        batch += max(0, skip.last - first + 1)
        left_out_to = max(left_out_to, skip.last)
    return batch
