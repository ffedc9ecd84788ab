"""Reads the learning-rate schedule that a trainer states in its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

from opt_ops.core.schedule import DECAYS, TABLE, is_computed
from opt_ops.core.values import LINEAR, Schedule
from opt_ops.runfolder import fields as f

_T = TypeVar("_T")
_STEPS = f.whole(1, f.MOST_STEPS)
_LR = f.number(0.0)
_SHAPE = f.number(0.0, 1e6)  # beyond it, powers and angles of a double are noise


def schedule_of(record: f.Record) -> Schedule:
    """The schedule in an object of config.json.

    Of a kind that is not computed, nothing but the kind is needed. Of the others, a wrong rate would be compared with
    the right one if a field were left out.

    Raises:
        BadField: a field that its kind needs is missing, or a field is not of its type.
    """
    kind = record.nullable("kind", f.name, LINEAR)
    if not is_computed(Schedule(kind=kind)):
        return Schedule(
            kind=kind,
            peak_lr=record.optional("peak_lr", _LR, 0.0),
            warmup_steps=record.optional("warmup_steps", f.step, 0),
            total_steps=record.optional("total_steps", _STEPS, 0),
            final_fraction=record.optional("final_fraction", f.number(), 0.0),
        )
    if kind == TABLE:
        return Schedule(kind=kind, delay=_delay(record), knots=_needed(record, kind, "knots", _knots))
    return Schedule(
        kind=kind,
        peak_lr=_needed(record, kind, "peak_lr", _LR),
        warmup_steps=record.nullable("warmup_steps", f.step, 0),
        warmup_from=record.nullable("warmup_from", f.number(), 0.0),
        delay=_delay(record),
        **_OWN[kind](record),
    )


def _delay(record: f.Record) -> int:
    return record.nullable("delay", f.whole(-f.MOST_STEPS, f.MOST_STEPS), 0)


def _needed(record: f.Record, kind: str, name: str, convert: Callable[[Any], _T]) -> _T:
    """A field that the kind cannot be computed without."""
    found = record.nullable(name, convert, None)
    if found is None:
        raise f.BadField(f"`schedule.{name}` is missing: a schedule of the kind {kind!r} needs it")
    return found


def _falling(record: f.Record, kind: str) -> dict[str, Any]:
    return {
        "total_steps": _needed(record, kind, "total_steps", _STEPS),
        "final_fraction": record.nullable("final_fraction", f.number(), 0.0),
    }


_OWN: Mapping[str, Callable[[f.Record], dict[str, Any]]] = {
    LINEAR: lambda record: _falling(record, LINEAR),
    "cosine": lambda record: {**_falling(record, "cosine"), "cycles": record.nullable("cycles", _SHAPE, 0.5)},
    "polynomial": lambda record: {**_falling(record, "polynomial"), "power": record.nullable("power", _SHAPE, 1.0)},
    "constant": lambda _: {},
    "wsd": lambda record: {
        **_falling(record, "wsd"),
        "decay_steps": _needed(record, "wsd", "decay_steps", f.step),
        "decay": record.nullable("decay", _decay, LINEAR),
    },
}
"""The fields that a kind has beside peak and warm-up."""


def _decay(value: Any) -> str:
    found = f.name(value)
    if found not in DECAYS:
        raise f.BadField(f"is {found!r}, not {', '.join(DECAYS)}")
    return found


def _knots(value: Any) -> tuple[tuple[float, float], ...]:
    found = tuple(_knot(each) for each in f.values(value))
    if not found:
        raise f.BadField("has no knot")
    if any(left >= right for (left, _), (right, _) in pairwise(found)):
        raise f.BadField("does not ascend: the update of each knot must be above the one before")
    return found


def _knot(value: Any) -> tuple[float, float]:
    pair = f.values(value)
    if len(pair) != 2:
        raise f.BadField(f"has a knot of {len(pair)} values, not of an update and a learning rate")
    return f.number()(pair[0]), _LR(pair[1])
