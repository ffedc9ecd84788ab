"""The learning rate of an update: the schedule of ``config.json`` times the factors in force.

``docs/formats.md`` has the formula of each kind. The supervisor computes it a second time, by code of its own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from opt_ops.contract.learning_rate import total_lr_factor

KINDS = ("linear", "cosine", "polynomial", "constant", "wsd", "table")
"""The kinds of schedules that can be computed."""


def lr_of(schedule: Mapping[str, Any], factors: Iterable[tuple[int, float]], step: int) -> float | None:
    """The learning rate of update ``step``. None if the schedule is of an unknown kind.

    Args:
        schedule: as in ``config.json``.
        factors: (step, factor) pairs.
        step: number of the update, from 1.

    Raises:
        ValueError: the schedule lacks a field of its kind, or a field cannot be computed with.
    """
    kind = schedule.get("kind", "linear")
    if kind not in KINDS:
        return None
    try:
        lr = _scheduled(kind, schedule, step) * total_lr_factor(step, factors)
        if not math.isfinite(lr):
            raise ArithmeticError(f"the learning rate of update {step} is {lr}")  # noqa: TRY301
    except KeyError as error:
        raise ValueError(f"a schedule of the kind {kind!r} needs the field {error}") from None
    except (TypeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"the schedule {dict(schedule)!r} cannot be computed: {error}") from error
    return lr


def _scheduled(kind: str, schedule: Mapping[str, Any], step: int) -> float:
    update = max(0, step - schedule.get("delay", 0))
    if kind == "table":
        return _between(schedule["knots"], update)
    warmup = schedule.get("warmup_steps", 0)
    if update < warmup:
        start = schedule.get("warmup_from", 0.0)
        return schedule["peak_lr"] * (start + (1.0 - start) * update / warmup)
    return schedule["peak_lr"] * _FRACTIONS[kind](schedule, update, warmup)


def _progress(schedule: Mapping[str, Any], update: int, warmup: int) -> float:
    """How much of the decay is over, from 0 to 1."""
    span = schedule["total_steps"] - warmup
    return min(1.0, (update - warmup) / span) if span > 0 else 0.0


def _linear(schedule: Mapping[str, Any], update: int, warmup: int) -> float:
    return 1.0 - (1.0 - schedule.get("final_fraction", 0.0)) * _progress(schedule, update, warmup)


def _cosine(schedule: Mapping[str, Any], update: int, warmup: int) -> float:
    final = schedule.get("final_fraction", 0.0)
    angle = 2.0 * math.pi * schedule.get("cycles", 0.5) * _progress(schedule, update, warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(angle))


def _polynomial(schedule: Mapping[str, Any], update: int, warmup: int) -> float:
    final = schedule.get("final_fraction", 0.0)
    return final + (1.0 - final) * (1.0 - _progress(schedule, update, warmup)) ** schedule.get("power", 1.0)


def _wsd(schedule: Mapping[str, Any], update: int, warmup: int) -> float:
    final, steps = schedule.get("final_fraction", 0.0), schedule["decay_steps"]
    late = update - (schedule["total_steps"] - steps)
    if late <= 0:
        return 1.0
    over = min(1.0, late / steps) if steps else 1.0
    decay = schedule.get("decay", "linear")
    if decay not in _DECAYS:
        raise ValueError(f"the decay {decay!r} is unknown; {', '.join(_DECAYS)} are known")
    return final + (1.0 - final) * _DECAYS[decay](over)


def _between(knots: Sequence[Sequence[float]], update: int) -> float:
    """The rate on the line between the two knots around ``update``."""
    if update <= knots[0][0]:
        return knots[0][1]
    for (left, before), (right, after) in pairwise(knots):
        if update <= right:
            return before + (after - before) * (update - left) / (right - left)
    return knots[-1][1]


_FRACTIONS = {
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "constant": lambda _schedule, _update, _warmup: 1.0,
    "wsd": _wsd,
}
_DECAYS = {
    "linear": lambda over: 1.0 - over,
    "cosine": lambda over: 0.5 * (1.0 + math.cos(math.pi * over)),
    "sqrt": lambda over: 1.0 - math.sqrt(over),
}
