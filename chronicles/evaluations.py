"""Evaluations of checkpoints over all runs: scores of tasks, and fixed prompts as checkpoints complete them.

A result is settled if the steps of its checkpoint are part of the present weights. A rollback takes it back; it stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from chronicles.record import LineageRecord, Moment
from chronicles.wording import short
from opt_ops.core import events as e
from opt_ops.core.decide.scores import falls
from opt_ops.core.decide.scores import series as series_of
from opt_ops.core.events.evaluation import apart, limit_of, score_key
from opt_ops.core.state.queries import counting_results
from opt_ops.core.values import Completion

_PARTS = r"(?:[-_.](?:test|validation|valid|val|dev|train|documents|docs))*"
"""What the name of a file may say behind that of the task whose texts it holds."""
_CALLED = 60  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """One metric of one task, measured on one checkpoint."""

    run: str
    step: int
    at: Moment
    settled: bool
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int
    limit: int | None  # only so many documents were to be scored; None: all
    harness: str
    task_version: str
    bos: bool | None
    contaminated: int | None  # documents removed from the training data that share text with the task
    fell: bool  # it is worse than the one before it, by more than chance explains
    digest: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsReport:
    """The fixed prompts, as one checkpoint completes them. Untrusted texts."""

    run: str
    step: int
    at: Moment
    settled: bool
    tokens: int
    seed: int
    prompts: tuple[Completion, ...]
    digest: str
    file: str
    sha256: str


def scores(record: LineageRecord) -> tuple[ScoreReport, ...]:
    """Every score once, as they were journaled."""
    state = record.state
    counts = counting_results(state, state.scores.values())
    fell = {score_key(fall.after) for fall in falls(counts)}
    settled = {score_key(each) for each in counts}
    removed = _removed(record)
    return tuple(
        ScoreReport(
            run=event.run,
            step=event.step,
            at=Moment(at),
            settled=key in settled,
            task=event.task,
            metric=event.metric,
            value=event.value,
            stderr=event.stderr,
            n=event.n,
            shots=event.shots,
            limit=limit_of(event.task_version),
            harness=event.harness,
            task_version=event.task_version,
            bos=event.bos,
            contaminated=_shared(removed, event.task),
            fell=key in fell,
            digest=event.digest,
            file=event.file,
            sha256=event.sha256,
        )
        for key, event, at in _scores(record)
    )


def _scores(record: LineageRecord) -> Iterator[tuple[str, e.CheckpointEvaluated, float]]:
    seen: set[str] = set()
    for entry in record.entries:
        if isinstance(entry.event, e.CheckpointEvaluated) and (key := score_key(entry.event)) not in seen:
            seen.add(key)
            yield key, entry.event, entry.ts


def called(score: ScoreReport) -> str:
    """What was measured, for a sentence: `piqa acc`, `piqa acc (5-shot, first-200)`. Untrusted text."""
    how = ", ".join(apart(score.shots, score.task_version))
    return short(f"{score.task} {score.metric}", _CALLED) + (f" ({how})" if how else "")


def measured_by(score: ScoreReport) -> str:
    """What else two scores have in common that are compared. Untrusted text."""
    return f"{score.harness}, task version {score.task_version}"


def completions(record: LineageRecord) -> tuple[CompletionsReport, ...]:
    """The completions of every checkpoint, in the order of their steps."""
    settled = {each.digest for each in counting_results(record.state, record.state.samples.values())}
    rows: dict[str, CompletionsReport] = {}
    for entry in record.entries:
        if not isinstance(event := entry.event, e.CheckpointSampled) or event.digest in rows:
            continue
        rows[event.digest] = CompletionsReport(
            run=event.run,
            step=event.step,
            at=Moment(entry.ts),
            settled=event.digest in settled,
            tokens=event.tokens,
            seed=event.seed,
            prompts=event.completions,
            digest=event.digest,
            file=event.file,
            sha256=event.sha256,
        )
    return tuple(sorted(rows.values(), key=lambda each: (each.step, each.at)))


# ---- the same thing measured at several steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What was measured in the same way at several steps."""

    settled: Sequence[ScoreReport]  # by step
    taken_back: Sequence[ScoreReport]  # by step

    @property
    def newest(self) -> ScoreReport:
        """The newest settled score; where a rollback took all of them back, the newest of these."""
        return (self.settled or self.taken_back)[-1]

    @property
    def previous(self) -> ScoreReport | None:
        """The settled score before the newest one."""
        return self.settled[-2] if len(self.settled) > 1 else None


def series(found: Iterable[ScoreReport]) -> list[Series]:
    """The scores by what was measured: tasks in the order in which they were first evaluated."""
    tasks: dict[str, dict[tuple[Any, ...], list[ScoreReport]]] = {}
    for each in found:
        tasks.setdefault(each.task, {}).setdefault(series_of(each), []).append(each)
    return [
        Series(
            settled=[each for each in ordered if each.settled],
            taken_back=[each for each in ordered if not each.settled],
        )
        for task in tasks.values()
        for rows in task.values()
        for ordered in [sorted(rows, key=lambda each: each.step)]
    ]


# ---- contamination


def _removed(record: LineageRecord) -> dict[str, int]:
    """By file of test texts, how many documents were removed from all data that the lineage has trained on."""
    found: dict[tuple[str, str], int] = {}
    for entry in record.entries:
        if isinstance(entry.event, e.AttemptConfigured):
            for each in entry.event.dedup:
                found |= {(f"{each.source} {each.digest}", file): number for file, number in each.against.items()}
    removed: dict[str, int] = {}
    for (_, file), number in found.items():
        removed[file] = removed.get(file, 0) + number
    return removed


def _shared(removed: dict[str, int], task: str) -> int | None:
    """Documents that shared text with a task; None if no file of test texts has its name."""
    numbers = [number for file, number in removed.items() if _is_of(PurePath(file), task)]
    return sum(numbers) if numbers else None


def _is_of(file: PurePath, task: str) -> bool:
    """`wsc.jsonl`, `wsc-test.jsonl`, `wsc+2f1a.jsonl` and `wsc/test.jsonl` are of wsc; `wsc273.jsonl` is not."""
    named = re.compile(rf"{re.escape(task)}(?:\+[\w.-]+)?{_PARTS}", re.IGNORECASE)
    return any(named.fullmatch(name) is not None for name in (file.name.partition(".jsonl")[0], file.parent.name))
