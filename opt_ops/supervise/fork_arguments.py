"""The arguments of a request `start` that begins a fork."""

from __future__ import annotations

from typing import Any

from opt_ops.core.values import LrFactor, Parent, Skip
from opt_ops.supervise.request_arguments import LONGEST_REASON, MOST_STEPS, Arguments, InvalidRequest


def origin(given: Arguments) -> dict[str, Any]:
    """What a fork takes over from its parent's checkpoint, beside settings and data: fields of `LineageStarted`.

    Empty: it is no fork.

    Raises:
        InvalidRequest: a value is not of its type, or out of bounds.
        KeyError: one is missing.
    """
    if not given.has("parent"):
        return {}
    parent = given.part("parent")
    checkpoint = parent.text("checkpoint", LONGEST_REASON)
    if not checkpoint.startswith("/"):
        raise InvalidRequest(f"parent.checkpoint is {checkpoint!r}, not an absolute path")
    return {
        "parent": Parent(
            lineage=parent.lineage("lineage"),
            run=parent.text("run"),
            step=parent.whole("step", 0, MOST_STEPS),
            checkpoint=checkpoint,
        ),
        "lr_factors": tuple(
            LrFactor(step=each.whole("step", 0, MOST_STEPS), factor=each.positive("factor"))
            for each in given.parts("lr_factors")
        ),
        "skips": tuple(
            Skip(first=each.whole("first", 0, MOST_STEPS), last=each.whole("last", 0, MOST_STEPS))
            for each in given.parts("skips")
        ),
    }
