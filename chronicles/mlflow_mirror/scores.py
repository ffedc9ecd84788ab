"""Scores as MLflow's metrics: what was measured on each run, and on the lineage's own run what is settled."""

from __future__ import annotations

from chronicles.evaluations import ScoreReport
from chronicles.mlflow_mirror.content import Sample, final_through, finite, key_part
from chronicles.report.model import LineageReport
from opt_ops.core.state.model import State

_LONGEST = 80  # characters of a task or a metric; MLflow takes keys of 250


def score_samples(report: LineageReport, state: State) -> dict[str, list[Sample]]:
    """By run, `eval/<task>/<metric>` at the checkpoint's step; the name of the lineage's own run is empty.

    It has the settled scores up to the step behind which the kept curve may still change, as it has the curve itself.
    """
    first: dict[tuple[str, str], int] = {}  # shots with which a metric was measured first
    found: dict[str, list[Sample]] = {}
    through = final_through(state)
    for each in report.evaluations:
        plain = first.setdefault((each.task, each.metric), each.shots) == each.shots
        sample = finite([(_key(each, plain=plain), each.value)], each.at, each.step)
        found.setdefault(each.run, []).extend(sample)
        if each.settled and (through is None or each.step <= through):
            found.setdefault("", []).extend(sample)
    return found


def _key(each: ScoreReport, *, plain: bool) -> str:
    """Scores with other numbers of shots are other curves: of a metric, the number that came first has no mark."""
    key = f"eval/{key_part(each.task, _LONGEST)}/{key_part(each.metric, _LONGEST)}"
    return key if plain else f"{key}/{each.shots}-shot"
