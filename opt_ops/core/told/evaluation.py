"""Sentences of evaluations of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.events.evaluation import limit_of
from opt_ops.core.state.model import State
from opt_ops.core.told.phrase import Forms, acts, because, count, figure, name, seen
from opt_ops.core.values import EvaluationEnd

_ENDS = {
    EvaluationEnd.DONE: "has ended",
    EvaluationEnd.FAILED: "has failed",
    EvaluationEnd.GIVEN_UP: "was given up",
    EvaluationEnd.LOST: "is lost",
}


def _intended(event: e.EvaluationIntended, known: State | None) -> Forms:
    what = f"the checkpoint of step {event.checkpoint.step:,} of {name(event.checkpoint.run)}"
    where = f"on {name(event.node)}" if event.node else "beside the daemon"
    return acts("evaluate", f"{what} {where} ({name(event.evaluation)})")


def _ended(event: e.EvaluationEnded, known: State | None) -> Forms:
    return seen(f"the evaluation {name(event.evaluation)} {_ENDS[event.end]}{because(event.why)}")


def _evaluated(event: e.CheckpointEvaluated, known: State | None) -> Forms:
    error = f" ± {figure(event.stderr, 2)}" if event.stderr is not None else ""
    score = f"{name(event.task)} {name(event.metric)} {figure(event.value, 3)}{error}"
    limit = limit_of(event.task_version)
    first = f", first {count(limit, 'document')}" if limit is not None else ""
    how = f"{name(event.harness)}, {count(event.shots, 'shot')}{first}"
    return seen(f"{name(event.run)} at step {event.step:,} scores {score} ({how})")


def _sampled(event: e.CheckpointSampled, known: State | None) -> Forms:
    return seen(f"{name(event.run)} at step {event.step:,} completes {count(len(event.completions), 'prompt')}")


RULES: Mapping[type[e.Event], Callable[[Any, State | None], Forms]] = {
    e.EvaluationIntended: _intended,
    e.EvaluationEnded: _ended,
    e.CheckpointEvaluated: _evaluated,
    e.CheckpointSampled: _sampled,
}
