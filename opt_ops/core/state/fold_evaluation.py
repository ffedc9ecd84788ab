"""What evaluations of checkpoints do to the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.checkpoints import Evaluation
from opt_ops.core.state.model import State
from opt_ops.core.state.update import with_item, with_request_handled


def _intended(state: State, event: e.EvaluationIntended, entry: e.Entry) -> State:
    evaluation = Evaluation(intended=event, at=entry.ts, epoch=entry.epoch)
    return replace(state, evaluations=with_item(state.evaluations, event.evaluation, evaluation))


def _ended(state: State, event: e.EvaluationEnded, entry: e.Entry) -> State:
    evaluation = replace(state.evaluations[event.evaluation], end=event.end, ended_at=entry.ts, why=event.why)
    return replace(state, evaluations=with_item(state.evaluations, event.evaluation, evaluation))


def _evaluated(state: State, event: e.CheckpointEvaluated, _: e.Entry) -> State:
    state, key = with_request_handled(state, event.request), score_key(event)
    return state if key in state.scores else replace(state, scores=with_item(state.scores, key, event))


def _sampled(state: State, event: e.CheckpointSampled, _: e.Entry) -> State:
    state = with_request_handled(state, event.request)
    known = event.digest in state.samples
    return state if known else replace(state, samples=with_item(state.samples, event.digest, event))


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.EvaluationIntended: _intended,
    e.EvaluationEnded: _ended,
    e.CheckpointEvaluated: _evaluated,
    e.CheckpointSampled: _sampled,
}
