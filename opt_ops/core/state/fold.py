"""`fold(state, entry) -> state`: the only way a lineage's state comes about. It decides nothing and reads no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state import fold_evaluation, fold_execution, fold_incidents, fold_members, fold_operator, fold_watch
from opt_ops.core.state.model import State
from opt_ops.core.state.status import IllegalTransition, status_after

_FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    **fold_operator.FOLDS,
    **fold_execution.FOLDS,
    **fold_incidents.FOLDS,
    **fold_members.FOLDS,
    **fold_evaluation.FOLDS,
    **fold_watch.FOLDS,
}


def fold(state: State, entry: e.Entry) -> State:
    """The state after one more journal entry.

    Raises:
        IllegalTransition: the event cannot follow on this state. The supervisor folds before it writes, so that such an
            event, a fault of ours, never reaches the journal.
    """
    try:
        status = status_after(state, entry.event)
        state = _FOLDS[type(entry.event)](state, entry.event, entry)
    except KeyError as error:
        raise IllegalTransition(f"{e.kind_of(entry.event)} names {error}, which the journal does not know") from error
    if status is not None:
        state = replace(state, status=status, since=entry.ts)
    return replace(state, seq=entry.seq, epoch=entry.epoch)


def replay(entries: Iterable[e.Entry]) -> State:
    """The state that a whole journal tells."""
    state = State()
    for entry in entries:
        state = fold(state, entry)
    return state
