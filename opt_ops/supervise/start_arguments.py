"""The arguments of a request `start`, and of one for other data: the shape, and what a fork takes over."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from opt_ops.core.state.data import why_data_stays
from opt_ops.core.state.model import State
from opt_ops.core.values import DataSince, LrFactor, Parent, Shape, Skip
from opt_ops.supervise.request_arguments import (
    LONGEST_REASON,
    MOST_NODES,
    MOST_RANKS,
    MOST_RANKS_IN_ALL,
    MOST_STEPS,
    Arguments,
    InvalidRequest,
)


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


def planned_data(given: Arguments) -> tuple[DataSince, ...]:
    """The changes of the data that are planned from the start, or that a fork takes over.

    Raises:
        InvalidRequest: a value is not of its type, or out of bounds, or the steps are not ascending.
        KeyError: one is missing.
    """
    found = tuple(
        DataSince(step=each.whole("step", 1, MOST_STEPS), data=each.texts("data")) for each in given.parts("data_since")
    )
    if any(one.step >= other.step for one, other in pairwise(found)) or not all(each.data for each in found):
        raise InvalidRequest("data_since is not a list of corpora with ascending steps")
    return found


def shape_of(given: Arguments) -> Shape:
    """What the lineage asks of the cluster.

    Raises:
        InvalidRequest: it is out of bounds.
        KeyError: a part is missing.
    """
    nodes = given.whole("nodes", 1, MOST_NODES)
    ranks = given.whole("ranks_per_node", 1, MOST_RANKS)
    if nodes * ranks > MOST_RANKS_IN_ALL:
        raise InvalidRequest(f"{nodes} nodes with {ranks} ranks each are more than {MOST_RANKS_IN_ALL} ranks")
    return Shape(
        nodes=nodes,
        spares=given.whole("spares", 0, MOST_NODES, 0),
        ranks_per_node=ranks,
        min_nodes=given.whole("min_nodes", 0, nodes, 0),
    )


def other_data(state: State, given: Arguments) -> tuple[str, ...]:
    """What to train on from the next run on; empty: as before.

    Raises:
        InvalidRequest: the trainer cannot change it. It would leave with 78, and the lineage would be halted.
    """
    data = given.texts("data", ())
    if data and (why := why_data_stays(state)):
        raise InvalidRequest(why)
    return data
