"""Compares what attempts trained, update by update. Losses are the witness: a trainer may tell what it did not do."""

from __future__ import annotations

from collections.abc import Iterable

from opt_ops.trainer_check.records import Ran


def equal(one: float, other: float, tolerance: float) -> bool:
    """Whether two losses are equal; with a tolerance, relative to the larger one or, below 1, absolute."""
    return one == other or abs(one - other) <= tolerance * max(1.0, abs(one), abs(other))


def differ(one: Ran, at: int, other: Ran, its: int, tolerance: float, name: str = "loss") -> bool | None:
    """Whether a field of step `at` of one attempt differs from that of step `its` of another.

    None if one of them is missing. If a step has several lines, one equal pair is enough.
    """
    mine, theirs = one.telemetry.all(at, name), other.telemetry.all(its, name)
    if not mine or not theirs:
        return None
    return not any(equal(a, b, tolerance) for a in mine for b in theirs)


def first_difference(
    one: Ran, other: Ran, steps: Iterable[int], tolerance: float, name: str = "loss", *, shift: int = 0
) -> int | None:
    """The first of `steps` at which a field differs; None if there is none.

    Args:
        one: An attempt. Its step is `steps` + `shift`.
        other: The attempt that `steps` belong to.
        steps: Steps.
        tolerance: See `equal`.
        name: The field.
        shift: Between the two counts of steps.
    """
    return next((s for s in steps if differ(one, s + shift, other, s, tolerance, name)), None)


def compared(one: Ran, other: Ran, steps: Iterable[int], name: str = "loss", *, shift: int = 0) -> int:
    """How many of `steps` both attempts have a number for."""
    return sum(differ(one, s + shift, other, s, 0.0, name) is not None for s in steps)


def pair(one: Ran, at: int, other: Ran, its: int, name: str = "loss") -> str:
    """`2.5012 in place of 2.4998`."""
    return f"{one.telemetry.one(at, name)!r} in place of {other.telemetry.one(its, name)!r}"
