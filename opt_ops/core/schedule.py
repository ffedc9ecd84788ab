"""The learning rate and the batch that an update must have used: written here a second time on purpose.

The proof of a rollback compares the live optimizer with this. It would prove nothing if both sides shared one
implementation. The formulas are those of docs/formats.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opt_ops.core.values import LINEAR, LrFactor, Schedule, Skip

TABLE = "table"
"""The kind that lists learning rates. Any other kind is `peak_lr` times something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLr:
    """The learning rates that a run was planned with."""

    schedule: Schedule
    factors: tuple[LrFactor, ...] = ()

    def at(self, step: int) -> float | None:
        """The planned learning rate of update `step`; None if the schedule is of a kind that is not known here."""
        return expected_lr(self.schedule, self.factors, step)

    def due(self, step: int, base_lr: float | None) -> float | None:
        """The same; of a kind that is not known here, what the schedule alone gave (`base_lr`) times the factors."""
        if base_lr is None or is_computed(self.schedule):
            return self.at(step)
        return base_lr * factor_at(self.factors, step)


def is_computed(schedule: Schedule) -> bool:
    """Whether the schedule is of a kind whose learning rates are known here."""
    return schedule.kind == TABLE or schedule.kind in _SHAPES


def peak_of(schedule: Schedule) -> float:
    """The highest learning rate of a schedule, as far as it states one."""
    return max((lr for _, lr in schedule.knots), default=0.0) if schedule.kind == TABLE else schedule.peak_lr


def scheduled_lr(schedule: Schedule, step: int) -> float | None:
    """The schedule alone at update `step` (1 is the first).

    None: the kind is not known here, or no finite number follows from its fields.
    """
    if not is_computed(schedule):
        return None
    try:
        update = max(0, step - schedule.delay)
        lr = _table(schedule, update) if schedule.kind == TABLE else _from_peak(schedule, update)
    except ArithmeticError:  # as 0 to a negative power
        return None
    return lr if math.isfinite(lr) else None


def expected_lr(schedule: Schedule, factors: Iterable[LrFactor], step: int) -> float | None:
    """The schedule times every factor in force at update `step`; None where `scheduled_lr` is None."""
    lr = scheduled_lr(schedule, step)
    if lr is None:
        return None
    for factor in factors:
        if factor.step < step:
            lr *= factor.factor
    return lr


def factor_at(factors: Iterable[LrFactor], step: int) -> float:
    """The product of the factors in force at update `step`."""
    return math.prod(each.factor for each in factors if each.step < step)


def _from_peak(schedule: Schedule, update: int) -> float:
    """The learning rate at an update of the schedule's own count: during the warm-up, and after it."""
    peak, warmup, begin = schedule.peak_lr, schedule.warmup_steps, schedule.warmup_from
    if update < warmup:
        return peak * begin + peak * (1.0 - begin) * update / warmup
    return peak * _SHAPES[schedule.kind](schedule, update)


def _progress(schedule: Schedule, update: int) -> float:
    """How much of the way from the end of the warm-up to the last step is gone: 0 to 1."""
    span = schedule.total_steps - schedule.warmup_steps
    return min(update - schedule.warmup_steps, span) / span if span > 0 else 0.0


def _linear(schedule: Schedule, update: int) -> float:
    return 1.0 - (1.0 - schedule.final_fraction) * _progress(schedule, update)


def _cosine(schedule: Schedule, update: int) -> float:
    angle = 2.0 * math.pi * schedule.cycles * _progress(schedule, update)
    return _above_end(schedule, 0.5 * (1.0 + math.cos(angle)) if math.isfinite(angle) else math.nan)


def _polynomial(schedule: Schedule, update: int) -> float:
    return _above_end(schedule, (1.0 - _progress(schedule, update)) ** schedule.power)


def _wsd(schedule: Schedule, update: int) -> float:
    """Warm-up, a level, and a decay over the last `decay_steps`."""
    gone = update - schedule.total_steps + schedule.decay_steps
    if gone <= 0:
        return 1.0
    share = min(gone / schedule.decay_steps, 1.0) if schedule.decay_steps > 0 else 1.0
    decay = DECAYS.get(schedule.decay)
    return _above_end(schedule, decay(share) if decay is not None else math.nan)


def _above_end(schedule: Schedule, share: float) -> float:
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * share


def _table(schedule: Schedule, update: int) -> float:
    """The learning rate between two knots."""
    knots = schedule.knots
    after = bisect_right(knots, update, key=lambda knot: knot[0])
    if not knots or after in (0, len(knots)):
        return knots[min(after, len(knots) - 1)][1] if knots else math.nan
    (left, low), (right, high) = knots[after - 1], knots[after]
    return low + (high - low) * ((update - left) / (right - left))


DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "sqrt": lambda share: 1.0 - math.sqrt(share),
}
"""How a `wsd` schedule falls: what is left of the way to its end after a share of the decay."""

_SHAPES: Mapping[str, Callable[[Schedule, int], float]] = {
    LINEAR: _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "constant": lambda _schedule, _update: 1.0,
    "wsd": _wsd,
}
"""The factor after the warm-up, by kind."""


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
