"""Scores and completed prompts: in the report, the logbook, the log, and beside what the data was searched for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronicles.evaluations import series
from chronicles.golden_scores import golden
from chronicles.logbook.drawing import scores as pictures
from chronicles.logbook.drawing.markup import plain
from chronicles.logbook.entries.build import entries
from chronicles.logbook.evaluation_rows import evaluations
from chronicles.logbook.notes.handover import handover
from chronicles.logbook.notes.handover_text import handover_text
from chronicles.logbook.notes.update import update, update_text
from chronicles.logbook.render import render
from chronicles.logbook.story.build import story
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import lineage
from chronicles.report.model import LineageReport
from opt_ops.core import events as e
from opt_ops.core.decide.scores import fallen
from opt_ops.core.told import told as sentence
from opt_ops.core.values import Deduplicated
from tests.chronicles.told import Told, rolled_back

PROMPT = "The largest model of the family"
BY = "lm-eval 0.4.13, task version 1.0"


def evaluate(told: Told, step: int, value: float, run: str | None = None) -> None:
    told.evaluated(step, run, value=value).evaluated(step, run, metric="acc", value=value - 0.1)
    told.evaluated(step, run, task="lambada_openai", metric="perplexity", value=20 / value, stderr=0.5, n=5153)
    told.sampled(step, (PROMPT, f"greedy at {step}", f"drawn at {step}"), run=run)


def removed(against: dict[str, int]) -> Deduplicated:
    counts = {"exact": 0, "near": 0, "contaminated": sum(against.values()), "corrupt": 0}
    return Deduplicated(
        source="clean",
        digest="sha256:1",
        threshold=0.95,
        documents_in=10,
        documents_out=5,
        removed=counts,
        against=against,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluated at 50, 100 and 150; rolled back to 100; evaluated at 150 and 200, where one score is worse."""
    told = Told(tmp_path_factory.mktemp("runs") / "12").begin().plan("12.00").hold()
    told.launch("12.00-a0")
    known = next(x.event for x in load(told.folder).entries if isinstance(x.event, e.AttemptConfigured))
    told.see(replace(known, dedup=(removed({"tests/hellaswag.jsonl": 3, "tests/piqa.jsonl": 1}),)))
    told.train("12.00-a0", 1, 200)
    point = told.save("12.00", 100)
    for step, value in ((50, 0.4), (100, 0.5), (150, 0.9)):
        evaluate(told, step, value)
    incident = rolled_back(told, point)
    told.train("12.01-a0", 101, 250).close(incident)
    for step, value in ((150, 0.55), (200, 0.40)):
        evaluate(told, step, value)
    return told.folder


@pytest.fixture(scope="module")
def record(folder: Path) -> LineageRecord:
    return load(folder)


@pytest.fixture(scope="module")
def report(record: LineageRecord) -> LineageReport:
    return build(record)


def test_the_report_has_each_score_once_and_says_which_are_settled(report: LineageReport):
    assert len(report.evaluations) == 15
    assert [(x.run, x.step) for x in report.evaluations if not x.settled] == [("12.00", 150)] * 3
    assert [(x.step, x.metric) for x in report.evaluations if x.fell] == [
        (200, "acc_norm"),
        (200, "acc"),
        (200, "perplexity"),
    ]
    written = lineage(report)
    assert list(written["evaluations"][0]) == [
        *("run", "step", "at", "settled", "task", "metric", "value", "stderr", "n", "shots", "limit"),
        *("harness", "task_version", "bos", "contaminated", "fell", "digest", "file", "sha256"),
    ]
    assert written["completions"][0]["prompts"] == [
        {"prompt": PROMPT, "greedy": "greedy at 50", "drawn": "drawn at 50"}
    ]


def test_a_result_that_is_journaled_twice_is_one_score(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    told.evaluated(50, value=0.5).evaluated(50, value=0.7)
    assert [x.value for x in build(load(told.folder)).evaluations] == [0.5], "the first one is in the journal"


def test_the_table_has_the_newest_beside_the_one_before(report: LineageReport):
    first, _, third = evaluations(report).rows
    assert (first.task, first.metric, first.newest, first.step) == ("hellaswag", "acc_norm", "0.400 ± 0.01", "200")
    assert (first.previous, first.change, first.worse) == ("0.550 at 150", "−0.150 (10.6 SE)", True)
    assert (third.metric, third.previous, third.worse) == ("perplexity", "36.36 at 150", True)
    (back,) = evaluations(report).taken_back
    assert (back.run, back.step) == ("12.00", "150")
    assert back.scores.startswith("hellaswag acc_norm 0.900 ± 0.01; hellaswag acc 0.800")


def test_the_curves_have_what_counts_and_what_was_taken_back(report: LineageReport):
    drawn = dict(pictures.draw(report))
    svg = drawn[f"hellaswag acc_norm, {BY}: 0.390 to 0.910"]
    assert re.findall(r"<title>([^<]*)</title>", svg) == [
        "0.900 ± 0.01 at step 150, taken back",
        "0.400 ± 0.01 at step 50",
        "0.500 ± 0.01 at step 100",
        "0.550 ± 0.01 at step 150",
        "0.400 ± 0.01 at step 200",
    ]
    assert len(re.findall('class="line run-0 gone"', svg)) == 1
    assert len(re.findall('class="error', svg)) == 5


def test_where_all_was_taken_back_the_row_says_so(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    told.evaluated(150, value=0.5)
    told.plan("12.01", "12.00", told.save("12.00", 100), [(100, 0.5)])
    (row,) = evaluations(build(load(told.folder))).rows
    assert (row.taken_back, row.step, row.previous) == (True, "150", "–")
    markdown, html, _ = (path.read_text() for path in render(told.folder))
    assert "TAKEN BACK" in html
    assert "**TAKEN BACK**" in markdown


def test_the_logbook_shows_scores_and_prompts(folder: Path):
    markdown, html, _ = (path.read_text() for path in render(folder))
    assert "| hellaswag | acc_norm | 0.400 ± 0.01 | 200 | 0.550 at 150 | −0.150 (10.6 SE) **WORSE** |" in markdown
    assert "3 documents removed" in markdown
    assert "| lambada_openai | perplexity |" in markdown
    assert "| not known |" in markdown, "no file of test texts is of lambada"
    assert markdown.index("greedy at 50") < markdown.index("greedy at 100") < markdown.index("greedy at 200")
    assert "| 150 of 12.00 **TAKEN BACK** | greedy at 150 | drawn at 150 |" in markdown
    assert html.count('<div class="scores">') == 1
    assert '<a href="#evaluations">Evaluations</a>' in html
    assert '<a href="#prompts">Completed prompts</a>' in html


def test_the_log_has_one_entry_for_a_checkpoint(record: LineageRecord, report: LineageReport):
    log = entries(record, report)
    told = [entry for entry in log if "evaluated" in entry.title]
    assert [(entry.run, entry.title[:21]) for entry in reversed(told)] == [
        ("12.00", "evaluated at step 50:"),
        ("12.00", "evaluated at step 100"),
        ("12.00", "evaluated at step 150"),
        ("12.01", "evaluated at step 150"),
        ("12.01", "evaluated at step 200"),
    ]
    worse = told[0]
    assert worse.title == (
        "evaluated at step 200, worse than before: hellaswag acc_norm 0.400, hellaswag acc 0.300 and 1 more"
    )
    facts = {fact.label: fact.text for fact in worse.facts}
    assert facts["Harness"] == "lm-eval 0.4.13."
    assert facts["Prompts"] == "1 fixed prompt completed; see Completed prompts."
    assert "a rollback took this step back" in {fact.label: fact.text for fact in told[2].facts}["Settled"]
    large = [each.title for each in story(record, report, log).entries if each.large]
    assert any("worse than before" in title for title in large), "a fall is told by itself"


def test_many_evaluations_do_not_flood_the_log(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 400)
    for step in range(10, 400, 10):
        for task in range(36):
            told.evaluated(step, task=f"task{task}", value=0.3 + step / 1000)
    record = load(told.folder)
    report = build(record)
    assert len(report.evaluations) == 39 * 36
    log = entries(record, report)
    assert sum("evaluated" in entry.title for entry in log) == 39
    told_entries = [each.title for each in story(record, report, log).entries]
    assert len(told_entries) <= 4, told_entries
    assert any("38 checkpoints evaluated" in title for title in told_entries), told_entries


def test_without_evaluation_nothing_is_said_of_it(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 80)
    markdown, html, _ = (path.read_text() for path in render(told.folder))
    assert "Evaluation" not in markdown
    assert "Completed prompts" not in markdown
    for mark in ('id="evaluations"', 'id="prompts"', "scores", "Completed prompts"):
        assert mark not in html.partition("</style>")[2], mark


def test_what_was_measured_in_another_way_is_never_compared_or_drawn_with_it(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    ways = ({}, {"task_version": "1.0 first 200"}, {"shots": 5}, {"task_version": "2.0"}, {"harness": "lm-eval 0.5"})
    for step in (50, 100):
        for place, way in enumerate(ways):
            told.evaluated(step, value=0.9 - 0.1 * place, **way)
    record = load(told.folder)
    report = build(record)
    assert [each.limit for each in report.evaluations[:3]] == [None, 200, None]
    assert not any(each.fell for each in report.evaluations), "each is as it was before"
    assert not list(fallen(record.state))
    shown = evaluations(report)
    assert [row.change for row in shown.rows] == ["+0.000 (0.0 SE)"] * len(ways)
    measured = {(row.shots, row.harness) for row in shown.rows}
    assert len(measured) == len(ways), "a reader sees what sets them apart"
    assert ("0", "lm-eval 0.4.13, task version 1.0 first 200") in measured
    assert len(dict(pictures.draw(report))) == len(ways)
    logged = [entry for entry in entries(record, report) if "evaluated at step 100" in entry.title]
    assert "hellaswag acc_norm (first-200) 0.800" in logged[0].title
    assert "hellaswag acc_norm (5-shot) 0.700" in str(logged[0].facts)
    assert "hellaswag acc_norm (first-200) 0.800" in str(handover(record, hours=24).evaluation)
    limited = next(each for each in record.state.scores.values() if each.task_version == "1.0 first 200")
    assert "first 200 documents" in sentence(limited)


# ---- the released models


def test_golden_values_stand_beside_the_same_size_only():
    small = golden("opt-125m", ("optim.peak_lr=0.001", "model.dropout=0.0"))
    assert small is not None
    assert (small.name, small.values["arc_easy", "acc"]) == ("released OPT-125M, zero-shot", 0.435)
    assert small.values["lambada_openai", "perplexity"] == 26.02
    assert golden("opt-125m", ("model.num_layers=6",)) is None
    assert golden("opt-tiny", ()) is None
    assert golden("gpt-125m", ()) is None
    assert golden(None, ()) is None
    large = golden("opt-175b", ())
    assert large is not None
    assert (large.values["hellaswag", "acc_norm"], large.source) == (0.783, "BigScience's evaluation results")


def test_the_column_of_the_released_model(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    for step in (20, 50):
        told.evaluated(step, task="piqa", metric="acc", value=0.55).evaluated(step, task="piqa", metric="acc", shots=5)
    report = replace(build(load(told.folder)), recipe="opt-125m")
    shown = evaluations(report)
    assert [(row.shots, row.golden) for row in shown.rows] == [("0", "0.630"), ("5", "")], "it is zero-shot"
    assert shown.golden == "released OPT-125M, zero-shot"
    drawn = dict(pictures.draw(report))
    assert "0.630: the released model" in drawn[f"piqa acc, {BY}: 0.540 to 0.630"]
    assert "released" not in drawn[f"piqa acc (5-shot), {BY}: 0.490 to 0.510"]


# ---- contamination


@pytest.mark.parametrize(
    ("file", "task", "found"),
    [
        ("tests/hellaswag.jsonl", "hellaswag", True),
        ("tests/HellaSwag-test.jsonl.gz", "hellaswag", True),
        ("hellaswag/test.jsonl", "hellaswag", True),
        ("tests/arc_easy_test.jsonl", "arc_easy", True),
        ("tests/wsc273.jsonl", "wsc", False),
        ("documents/wsc+lm-eval-0.4.13.jsonl", "wsc", True),
        ("tests/arc_easy.jsonl", "arc", False),
        ("tests/valid.jsonl", "hellaswag", False),
        ("tests/a.b.jsonl", "a+b", False),
    ],
)
def test_which_file_is_of_which_task(told: Told, file: str, task: str, found: bool):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    known = next(x.event for x in load(told.folder).entries if isinstance(x.event, e.AttemptConfigured))
    told.see(replace(known, dedup=(removed({file: 2}),)), replace(known, dedup=(removed({file: 2}),)))
    told.train("12.00-a0", 1, 60).evaluated(50, task=task)
    (score,) = build(load(told.folder)).evaluations
    assert score.contaminated == (2 if found else None), "the same data is counted once"


def test_data_that_was_searched_without_a_hit_is_told_apart_from_data_that_was_not(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    known = next(x.event for x in load(told.folder).entries if isinstance(x.event, e.AttemptConfigured))
    told.see(replace(known, dedup=(removed({"tests/hellaswag.jsonl": 0}),)))
    told.train("12.00-a0", 1, 60).evaluated(50).evaluated(50, task="piqa")
    rows = evaluations(build(load(told.folder))).rows
    assert [row.contaminated for row in rows] == ["none found", "not known"]


# ---- whatever is measured


_value = st.floats(-1e6, 1e6, allow_nan=False)
_score = st.tuples(
    st.sampled_from(("12.00", "12.01")), st.integers(0, 300), st.sampled_from(("acc", "perplexity", "x")), _value
)


@given(found=st.lists(_score, max_size=30))
def test_every_score_is_in_exactly_one_series_and_every_drawing_is_finite(
    record: LineageRecord, report: LineageReport, found: list[tuple[str, int, str, float]]
):
    (like, *_) = report.evaluations
    made = [
        replace(like, run=run, step=step, metric=metric, value=value, settled=run == "12.01")
        for run, step, metric, value in found
    ]
    grouped = series(made)
    assert sorted(id(x) for each in grouped for x in (*each.settled, *each.taken_back)) == sorted(map(id, made))
    for each in grouped:
        assert [x.step for x in each.settled] == sorted(x.step for x in each.settled)
    other = replace(report, evaluations=tuple(made))
    assert len(evaluations(other).rows) == len(grouped)
    for _, svg in pictures.draw(other):
        assert not re.search("nan|inf", svg)


# ---- notes


def test_notes_say_in_one_sentence_what_was_measured_last(record: LineageRecord):
    note = handover(record, hours=24)
    assert note.evaluation is not None
    assert re.fullmatch(
        r"Newest evaluation, step 200, .* UTC: hellaswag acc_norm 0\.400 \(0\.550 at step 150\), "
        r"hellaswag acc 0\.300 \(0\.450 at step 150\), lambada_openai perplexity 50\.00 \(36\.36 at step 150\)\. "
        r"Worse by more than three standard errors: hellaswag acc_norm, hellaswag acc, lambada_openai perplexity\.",
        note.evaluation,
    )
    assert plain(note.evaluation) in handover_text(note)
    assert handover(record, hours=0.0001).evaluation is None, "it did not come in that time"
    told = update(record, 0.6, 0.0)  # when step 240 was complete
    assert told.evaluation is not None
    assert told.evaluation.startswith("Newest evaluation, step 100"), "that of step 150 was taken back by then"
    assert plain(told.evaluation) in update_text(told)


def test_of_an_older_step_that_is_evaluated_last_its_own_score_is_told(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    told.evaluated(150, value=0.5).evaluated(50, value=0.3)
    note = handover(load(told.folder), hours=24)
    assert note.evaluation is not None
    assert "step 50," in note.evaluation
    assert note.evaluation.endswith("hellaswag acc_norm 0.300.")
