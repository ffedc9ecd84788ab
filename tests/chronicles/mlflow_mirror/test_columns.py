"""The numbers of MLflow's columns, and the marks of incidents on its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronicles.mlflow_mirror.columns import _Median, columns
from chronicles.mlflow_mirror.content import Sample
from chronicles.record import load, until
from chronicles.report.build import build
from opt_ops.core.events import LineageHalted
from opt_ops.core.values import Action, Outcome
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told, spiked

RECORD = load(LINEAGE)
REPORT = build(RECORD)
COLUMNS = columns(RECORD, REPORT)
WANTED = ("step", "loss", "goodput", "lr_scale", "incidents", "steps_taken_back", "nodes")


def shown(samples: Sequence[Sample]) -> dict[str, float]:
    """What MLflow shows in a column: the value of the highest step, the newest of those."""
    ranked = sorted(samples, key=lambda sample: (sample.step, sample.timestamp))
    return {sample.key: sample.value for sample in ranked}


def columns_of(folder: Path) -> dict[str, dict[str, float]]:
    record = load(folder)
    return {run: shown([*each.progress, *each.marks]) for run, each in columns(record, build(record)).items()}


def test_every_run_has_a_value_in_every_column():
    for run, each in COLUMNS.items():
        assert {f"ops/{key}" for key in WANTED} <= set(shown([*each.progress, *each.marks])), run


def test_the_columns_agree_with_the_ledger():
    top = shown([*COLUMNS[""].progress, *COLUMNS[""].marks])
    assert top["ops/goodput"] == REPORT.ledger.goodput
    assert top["ops/steps_taken_back"] == REPORT.ledger.steps_discarded == 211
    assert (top["ops/step"], top["ops/lr_scale"], top["ops/incidents"]) == (600, 0.75, 3), (
        "one incident stopped nothing"
    )
    assert shown(COLUMNS["1.00"].progress)["ops/steps_taken_back"] == 211
    assert shown(COLUMNS["1.01"].progress)["ops/steps_taken_back"] == 0
    before = shown(COLUMNS[""].progress)["ops/goodput"]
    assert before == pytest.approx(REPORT.ledger.goodput, rel=0.01)


def test_an_incident_is_a_mark_on_the_curve():
    marks = [(s.key, s.step, s.value) for s in COLUMNS["1.00"].marks if s.key != "ops/incidents" and s.step > 300]
    assert marks == [(f"ops/{key}", step, value) for key in ("incident", "drill") for step, value in MARK]
    assert [(s.step, s.value) for s in COLUMNS[""].marks if s.key == "ops/incidents"] == [
        (0, 0),
        (75, 1),
        (111, 2),
        (321, 3),
    ]


MARK = [(321, 1), (320, 0), (322, 0)]


def test_neighbours_keep_their_marks(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50).end("12.00-a0", Outcome.FAILED, 50)
    first = told.incident("process_death", "exit 1", "12.00-a0", 50)
    told.decide(first, Action.RESTART).launch("12.00-a1", None, first).train("12.00-a1", 1, 51)
    told.end("12.00-a1", Outcome.FAILED, 51)
    second = told.incident("process_death", "exit 1", "12.00-a1", 51)
    told.decide(second, Action.HALT).see(LineageHalted(why="twice", incident=second))
    record = load(told.folder)
    marks = columns(record, build(record))[""].marks
    assert shown([s for s in marks if s.key == "ops/incident" and s.step == 50]) == {"ops/incident": 1}
    assert shown([s for s in marks if s.key == "ops/incident" and s.step == 51]) == {"ops/incident": 1}
    assert not [s for s in marks if s.key == "ops/drill"]
    assert columns_of(told.folder)[""]["ops/incidents"] == 2


def test_after_a_rollback_the_column_shows_where_the_lineage_is(told: Told):
    top = columns_of(spiked(told).folder)
    assert top[""]["ops/step"] == 140, "not 200, which the run before it had reached"
    assert top[""]["ops/steps_taken_back"] == top["12.00"]["ops/steps_taken_back"] == 100
    assert (top["12.00"]["ops/step"], top["12.01"]["ops/lr_scale"]) == (200, 0.5)


@pytest.mark.parametrize("seq", range(5, len(RECORD.entries), 7))
def test_what_was_sent_stays_right(seq: int):
    record = until(RECORD, RECORD.entries[seq].ts)
    for run, each in columns(record, build(record)).items():
        then, now = list(each.progress), list(COLUMNS[run].progress)
        assert then == now[: len(then)], run


def test_a_long_lineage_is_thinned(told: Told):
    told.steps = 400_000
    told.begin().plan("12.00").hold().launch("12.00-a0")
    for first in range(1, 400, 10):
        told.train("12.00-a0", first, first + 9)
    record = load(told.folder)
    steps = [s.value for s in columns(record, build(record))[""].progress if s.key == "ops/step"]
    assert steps == [1, *range(40, 401, 40)]


@given(st.lists(st.tuples(st.integers(1, 9).map(float), st.integers(1, 3)), min_size=1, max_size=30))
def test_the_running_median_is_the_median(paces: list[tuple[float, int]]):
    running = _Median()
    for seconds, steps in paces:
        running.add(seconds, steps)
    ranked = sorted(seconds for seconds, steps in paces for _ in range(steps))
    assert running.seconds == ranked[(len(ranked) - 1) // 2]
