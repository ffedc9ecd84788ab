"""Scores as MLflow's metrics: what was measured on each run, and on the lineage's own run what is settled."""

from __future__ import annotations

import hashlib
from typing import Any

from chronicles.evaluations import ScoreReport, measured_by
from chronicles.mlflow_mirror.content import Sample, final_through, finite, key_part
from chronicles.report.model import LineageReport
from opt_ops.core.decide.scores import series
from opt_ops.core.events.evaluation import apart
from opt_ops.core.state.model import State

_LONGEST, _LONGEST_MARK = 80, 40  # characters of a task or a metric, and of a mark; MLflow takes keys of 250


def score_samples(report: LineageReport, state: State) -> dict[str, list[Sample]]:
    """By run, `eval/<task>/<metric>` at the checkpoint's step; the name of the lineage's own run is empty.

    It has the settled scores up to the step behind which the kept curve may still change, as it has the curve itself.
    Only scores of one series share a key.
    """
    owners: dict[str, Any] = {}  # by key, the series that had it first
    found: dict[str, list[Sample]] = {}
    through = final_through(state)
    for each in report.evaluations:
        key = _key(each)
        if owners.setdefault(key, series(each)) != series(each):
            key = f"{key}/{_mark(each)}"
        sample = finite([(key, each.value)], each.at, each.step)
        found.setdefault(each.run, []).extend(sample)
        if each.settled and (through is None or each.step <= through):
            found.setdefault("", []).extend(sample)
    return found


def _key(each: ScoreReport) -> str:
    """The name alone is that of the zero-shot score of all documents: 5 shots, or 200 documents, are other curves."""
    name = f"eval/{key_part(each.task, _LONGEST)}/{key_part(each.metric, _LONGEST)}"
    return "/".join((name, *apart(each.shots, each.task_version)))


def _mark(each: ScoreReport) -> str:
    """Of another harness or version of the task; or of a task whose name looks the same in MLflow's characters."""
    digits = hashlib.sha256(repr(series(each)).encode("utf-8", "replace")).hexdigest()[:6]
    return f"{key_part(measured_by(each), _LONGEST_MARK)} {digits}"
