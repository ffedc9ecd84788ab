"""A learning-rate schedule in words."""

from __future__ import annotations

from chronicles.wording import count, rate, short, whole
from opt_ops.core.schedule import TABLE, is_computed
from opt_ops.core.values import Schedule

_FALLS = {"linear": "linearly", "cosine": "as a cosine", "sqrt": "as one minus a square root"}


def in_words(schedule: Schedule, total: int | None) -> str:
    """What a schedule does, in sentences. `total` is the last step that is trained; None: not known."""
    if not is_computed(schedule):
        return f"Of the kind {short(schedule.kind, 40)}, which opt-ops does not compute: only factors can be proven."
    if schedule.kind == TABLE:
        text = _table(schedule)
    else:
        text = f"Peak learning rate {rate(schedule.peak_lr)} {_warm_up(schedule)}, {_after(schedule, total)}."
    return f"{text} The schedule lags {count(schedule.delay, 'step')}." if schedule.delay else text


def _warm_up(schedule: Schedule) -> str:
    text = f"after {count(schedule.warmup_steps, 'warm-up step')}"
    return f"{text} from {100 * schedule.warmup_from:g} % of it" if schedule.warmup_from else text


def _after(schedule: Schedule, total: int | None) -> str:
    if schedule.kind == "constant":
        return "constant from there on"
    end = schedule.total_steps + schedule.delay
    to_end = f"to {100 * schedule.final_fraction:g} % of it at step {whole(end)}{_end(end, total)}"
    match schedule.kind:
        case "cosine":
            cycles = "half a cosine" if schedule.cycles == 0.5 else f"{schedule.cycles:g} cycles of a cosine"
            ends = to_end if schedule.cycles == 0.5 else f"between it and {to_end.removeprefix('to ')}"
            return f"following {cycles} {ends}"
        case "polynomial":
            return f"falling as a polynomial of power {schedule.power:g} {to_end}"
        case "wsd":
            falls = _FALLS.get(schedule.decay, short(schedule.decay, 40))
            return f"level until step {whole(end - schedule.decay_steps)}, then falling {falls} {to_end}"
        case _:
            return f"falling {to_end}"


def _end(falls_until: int, total: int | None) -> str:
    return ", where training ends" if falls_until == total else f"; training ends at step {whole(total)}"


def _table(schedule: Schedule) -> str:
    first, last = schedule.knots[0], schedule.knots[-1]
    if len(schedule.knots) == 1:
        return f"Learning rate {rate(first[1])}, constant (a table of one point)."
    return (
        f"Learning rates from a table of {count(len(schedule.knots), 'point')}: {rate(first[1])} at step "
        f"{first[0]:g}, {rate(last[1])} from step {last[0]:g} on."
    )
