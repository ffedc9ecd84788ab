"""Scores that have become worse from one settled evaluation to the next by more than chance explains."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from opt_ops.core.events import AlertIntended, CheckpointEvaluated
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.memo import memoize_recent
from opt_ops.core.names import AlertTopic, alert_id
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import counting_results
from opt_ops.core.told.phrase import count, figure, name
from opt_ops.core.values import Severity

STANDARD_ERRORS = 3.0
"""Of the difference of two scores. By chance, one comparison in 740 is worse by more (normal distribution)."""

_BETTER = {
    **dict.fromkeys(("acc", "acc_norm", "f1", "em", "exact_match"), 1),
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "loss"), -1),
}


def better(metric: str) -> int | None:
    """1: higher values are better; -1: lower ones; None: it is not known. `acc,none` is lm-eval's way to say `acc`."""
    return _BETTER.get(metric.partition(",")[0])


series = attrgetter("task", "metric", "shots", "harness", "task_version")
"""What two scores must have in common to be compared, of an event as of a row of the report."""


class Measured(Protocol):
    """A value with its standard error."""

    @property
    def value(self) -> float:
        """What was measured."""
        ...

    @property
    def stderr(self) -> float | None:
        """None: it is not known."""
        ...


def errors_between(before: Measured, after: Measured) -> float | None:
    """By how many standard errors of the difference the value rose; None where an error is not known.

    Infinite where both errors are 0, as where every document was answered rightly, then every one wrongly.
    """
    if before.stderr is None or after.stderr is None:
        return None
    rise, error = after.value - before.value, math.hypot(before.stderr, after.stderr)
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """A score that is worse than the one before it."""

    before: CheckpointEvaluated
    after: CheckpointEvaluated
    errors: float  # of the difference


def falls(scores: Iterable[CheckpointEvaluated]) -> Iterator[Fall]:
    """The falls among settled scores, which are given as they were journaled.

    Each score is compared with the one before it in steps. A result that comes out of step order is not compared: what
    followed it is known already.
    """
    newest: dict[tuple[Any, ...], CheckpointEvaluated] = {}
    for score in scores:
        before = newest.get(series(score))
        if before is not None and score.step <= before.step:
            continue
        newest[series(score)] = score
        if before is None:
            continue
        errors = errors_between(before, score)
        if errors is not None and -(better(score.metric) or 0) * errors > STANDARD_ERRORS:
            yield Fall(before=before, after=score, errors=abs(errors))


def fallen(state: State) -> Sequence[AlertIntended]:
    """A warning for each fall. Nothing follows from it: a person judges what it means."""
    return _fallen(state.intent.lineage, state.runs, state.scores) if state.scores else ()


@memoize_recent
def _fallen(
    lineage: str, runs: Mapping[str, Run], scores: Mapping[str, CheckpointEvaluated]
) -> Sequence[AlertIntended]:
    return [_warning(lineage, fall) for fall in falls(counting_results(State(runs=runs), scores.values()))]


def _warning(lineage: str, fall: Fall) -> AlertIntended:
    before, after = fall.before, fall.after
    pair = hashlib.sha256(f"{score_key(before)}\n{score_key(after)}".encode()).hexdigest()[:12]
    what = f"{name(after.task)} {name(after.metric)}"
    how = f"{name(after.harness)}, {count(after.shots, 'shot')}, task version {name(after.task_version)}"
    body = [
        f"{what}: {_value(before)}, {_value(after)}",
        f"worse by {_errors(fall.errors)}; told from {STANDARD_ERRORS:g} standard errors on",
        f"{how}, {count(after.n, 'document')}",
        "Nothing was touched.",
        f"next: opt-ops ckpt scores {lineage}",
    ]
    return AlertIntended(
        alert=alert_id(lineage, f"{AlertTopic.SCORE_FELL}/{before.step}-{after.step}/{pair}"),
        severity=Severity.WARNING,
        title=f"opt-ops {lineage}: a score is worse at step {after.step:,}: {what}",
        body="\n".join(body),
    )


def _errors(errors: float) -> str:
    many = f"{errors:.1f} standard errors of the difference"
    return many if math.isfinite(errors) else "more than chance: both standard errors are 0"


def _value(score: CheckpointEvaluated) -> str:
    error = f" ± {figure(score.stderr, 2)}" if score.stderr is not None else ""
    return f"{figure(score.value, 3)}{error} at step {score.step:,} of {score.run}"
