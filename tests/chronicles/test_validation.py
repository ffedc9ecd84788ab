"""Losses on validation data: on the front page, on the curves, in the progress note and in MLflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chronicles.logbook.drawing import figure
from chronicles.logbook.drawing.curves import letter, validation
from chronicles.logbook.front_page import KeyFigure, front_page
from chronicles.logbook.notes.update import update, update_text
from chronicles.logbook.render import render
from chronicles.mlflow_mirror import content
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import encode
from chronicles.report.model import LineageReport
from tests.chronicles.told import Told, rolled_back


def evaluated(step: int) -> dict[str, float | None] | None:
    """Two corpora every 40 steps; the second one rises again in the end, and was once not finite."""
    if step % 40:
        return None
    code = None if step == 120 else round(2.0 + abs(step - 240) / 400, 3)
    return {"wiki": round(5.0 - step / 100, 3), "code": code}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained to 200, rolled back to 100, trained to 360 of 400."""
    told = Told(tmp_path_factory.mktemp("runs") / "12").begin().plan("12.00").hold()
    told.launch("12.00-a0").train(
        "12.00-a0", 1, 200, valid=lambda step: {"wiki": 9.0} if step == 160 else evaluated(step)
    )
    point = told.save("12.00", 100)
    incident = rolled_back(told, point)
    told.train("12.01-a0", 101, 360, valid=evaluated).close(incident)
    told.save("12.01", 350)
    return told.folder


@pytest.fixture(scope="module")
def record(folder: Path) -> LineageRecord:
    return load(folder)


@pytest.fixture(scope="module")
def report(record: LineageRecord) -> LineageReport:
    return build(record)


def test_only_kept_evaluations_are_reported(report: LineageReport):
    wiki, code = report.validation
    assert encode(wiki) == {
        "corpus": "wiki",
        "evaluations": 9,
        "step": 360,
        "loss": 1.4,
        "previous": 1.8,
        "lowest": 1.4,
        "lowest_step": 360,
    }
    assert (code.loss, code.lowest, code.lowest_step, code.previous) == (2.3, 2.0, 240, 2.2)


def test_the_front_page_letters_them_as_the_curves_do(record: LineageRecord, report: LineageReport):
    rows = front_page(report, None).validation
    assert [(row.letter, row.corpus, row.loss) for row in rows] == [
        ("a", "wiki", "1.400"),
        ("b", "code", "2.300"),
    ]
    assert rows[1].lowest == "2.000 after 240"
    assert [(name, step) for step, _, name in validation(record).labels] == [("a", 360), ("b", 360)]
    assert [letter(place) for place in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]


def test_the_curve_has_what_counts_and_what_was_taken_back(record: LineageRecord):
    drawn = validation(record)
    peaks = [(line.kept, line.steps) for line in drawn.lines if 9.0 in line.values]
    assert peaks == [(False, (80, 120, 160, 200))], "it hangs on what counts"
    assert drawn.gaps == [120], "twice, and drawn once"


def test_the_page_shows_them(folder: Path):
    markdown, html, _ = (path.read_text() for path in render(folder))
    assert "| b code | 2.300 | 360 | 2.200 | 2.000 after 240 | 9 |" in markdown
    assert html.count("Validation loss, nats per token") == len(figure.SIZES)
    assert "<b>b</b> code" in html


def test_of_one_corpus_the_loss_stands_among_the_large_figures(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 80, valid=lambda step: {"wiki": 3.25} if step == 40 else None)
    first = front_page(build(load(told.folder)), None)
    assert KeyFigure(label="Validation loss", value="3.250", more="after step 40") in first.figures
    assert first.validation[0].letter == ""


def test_without_evaluation_nothing_is_said_of_it(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 80)
    pages = "".join(path.read_text() for path in render(told.folder)[:2])
    assert "Validation" not in pages


def test_a_progress_note_says_where_they_went(record: LineageRecord):
    text = update_text(update(record, 0.9, 0.6))
    assert "Loss on validation data: wiki 2.600 → 1.400, code 2.000 → 2.300 (lowest 2.000 after step 240)." in text
    assert "wiki 3.800, code 2.400." in update_text(update(record, 0.3, 0.0)), "of step 80: it was not finite after 120"


def line(step: int, **valid: float | None) -> dict[str, Any]:
    return {"ts": 10.0 + step, "num_updates": step, "loss": 5.0, "valid": valid or None}


def test_mlflow_gets_every_evaluation_and_none_twice():
    lines = [line(3, wiki=3.0), line(7, wiki=None), line(10, wiki=2.5), line(11)]
    every = content.Choice(every=10, windows=())
    sent = [s for _, found in content.unsent(lines, every, 0, None) for s in found]
    assert [(s.key, s.step, s.value) for s in sent] == [
        ("valid/wiki", 3, 3.0),
        ("loss", 10, 5.0),
        ("valid/wiki", 10, 2.5),
    ]
    near = content.Choice(every=10, windows=((1, 5),))
    later = [s for _, found in content.unsent(lines, near, 4, every) for s in found]
    assert [(s.key, s.step) for s in later] == [("loss", 3)], "its loss was left out before, its evaluation was not"


def test_names_that_mlflow_would_refuse_are_written_otherwise():
    (sample,) = content.evaluations(line(1, **{"../a<b>:$": 1.0}))
    assert re.fullmatch(r"valid/[A-Za-z0-9_. -]+", sample.key)
    assert ".." not in sample.key


def test_the_settled_curve_has_the_evaluations_that_count(record: LineageRecord):
    found = [s for _, samples in content.kept_samples(record, 400_000, 0) for s in samples]
    assert {s.key for s in found} >= {"settled/valid/wiki", "settled/valid/code"}
    assert [s.step for s in found if s.key == "settled/valid/wiki"] == [40, 80, 120, 160, 200, 240, 280, 320]
    assert all(s.value != 9.0 for s in found), "the rollback discarded it"
