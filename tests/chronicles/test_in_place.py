"""Ranks that are replaced while the others keep running: what report, logbook, ledger, MLflow and alerts make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chronicles.ledger.wall_clock import Stage, TimePhase, ledger
from chronicles.logbook.entries.build import entries
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import front_page
from chronicles.mlflow_mirror import content
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import explanation, incident_row, lineage
from chronicles.report.model import LineageReport
from opt_ops.cli.run.explain_lines import explanation_lines
from opt_ops.core import events as e
from opt_ops.core.health.lemons import parts
from opt_ops.core.values import Severity
from tests.chronicles.eventful import Lived
from tests.chronicles.in_place import lost_ranks, replaced

NO_STANDBY = "no spare node is fit with 2 warm ranks to take the place of n1"
BOTH = "the ranks have no common step: the state of some of them is lost"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    return lost_ranks(tmp_path_factory.mktemp("runs") / "12")


@pytest.fixture(scope="module")
def record(told: Lived) -> LineageRecord:
    return load(told.folder)


@pytest.fixture(scope="module")
def report(record: LineageRecord) -> LineageReport:
    return build(record)


@pytest.fixture(scope="module")
def rows(report: LineageReport) -> list[dict[str, Any]]:
    return lineage(report)["incidents"]


@pytest.fixture(scope="module")
def log(record: LineageRecord, report: LineageReport) -> dict[str, LogEntry]:
    """By incident."""
    return {entry.anchor: entry for entry in entries(record, report)}


def test_the_report_says_what_became_of_the_ranks(rows: list[dict[str, Any]]):
    names = ("in_place", "generation", "ranks_replaced", "pids_kept", "steps_repeated", "fell_back")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (True, 2, [2, 3], True, 0, None),
        (False, None, [], None, None, NO_STANDBY),
        (False, 2, [7], None, None, BOTH),
    ]
    assert [row["action"] for row in rows] == ["replace_ranks", "restart", "restart"]
    first = rows[0]
    assert (first["proven"], first["step_resumed"], first["steps_lost"], first["next_attempt"]) == (True, 120, 0, None)
    assert first["seconds_down"] == pytest.approx(sum(first[f"seconds_to_{w}"] for w in _SECONDS), abs=0.01)


_SECONDS = ("see", "decide", "relaunch", "first_step")


def test_before_it_is_proven_nothing_is_claimed(tmp_path: Path):
    story = replaced(tmp_path / "12")
    (row,) = lineage(build(load(story.folder)))["incidents"]
    assert (row["in_place"], row["generation"], row["pids_kept"], row["proven"]) == (True, 2, None, None)
    text = "\n".join(explanation_lines(build(load(story.folder)).incidents[0]))
    assert "proof     not known yet" in text


def test_every_view_of_an_incident_has_it(report: LineageReport):
    row = report.incidents[0]
    assert incident_row(row)["in_place"] is True
    assert explanation(row)["ranks_replaced"] == [2, 3]
    assert explanation(report.incidents[1])["fell_back"] == NO_STANDBY


def test_sentences_of_the_logbook(log: dict[str, LogEntry]):
    facts = {name: {fact.label: fact.text for fact in log[name].facts} for name in ("12-i000", "12-i001", "12-i002")}
    assert facts["12-i000"]["In place"] == (
        "Rank 3 on n2 died at step 120. The other 6 processes stayed. n5 took the place of n2, with ranks 2–3. "
        "Training went on with step 121 after 9.0 s."
    )
    assert facts["12-i000"]["Cost"].startswith("0 steps discarded, 9.0 s of downtime")
    assert "All other processes are the same as before" in facts["12-i000"]["Proof"]
    assert "Resumed" not in facts["12-i000"]
    assert facts["12-i001"]["In place"] == (
        f"Rank 0 on n1 was not replaced in place: {NO_STANDBY}. All ranks were restarted from step 200."
    )
    assert facts["12-i002"]["In place"] == (
        f"Rank 7 on n4 was not replaced in place: {BOTH}. All ranks were restarted from step 300."
    )
    assert "replaced ranks 2–3 in place: rank 3 on n2 was killed" in log["12-i000"].heading
    changed = {change.what: (change.before, change.after) for change in log["12-i000"].changes}
    assert changed == {"nodes": ("n1, n2, n3, n4", "n1, n5, n3, n4"), "generation": ("1", "2")}
    assert [label for label, _ in log["12-i000"].spans][2] == "to order the new ranks"


def test_the_front_page_counts_it(report: LineageReport):
    assert "3 incidents, 1 recovered in place: all proven" in front_page(report, None).lead


def test_the_ledger_of_a_replacement(record: LineageRecord, report: LineageReport):
    book = ledger(record)
    lost = book.lost["12-i000"]
    assert lost[Stage.REPEATING] == pytest.approx(3.0, abs=0.01), "the step in flight, from the last update to the loss"
    assert book.downtime("12-i000") == pytest.approx(report.incidents[0].seconds_down, abs=0.01)
    assert not lost[Stage.ENDING] + lost[Stage.QUEUEING], "nothing had to end, and no node was waited for"
    assert lost[Stage.LOADING] == pytest.approx(7.0, abs=0.01)
    assert sum(book.phases.values()) == pytest.approx(book.wall)
    assert book.steps_kept == 420
    assert book.steps_repeated == 40, "of the two restarts"
    assert report.ledger.reliability.recoveries == 3
    assert report.ledger.reliability.recoveries_in_place == 1
    assert report.ledger.restarts.total == 2
    assert book.phases[TimePhase.KEPT] + book.phases[TimePhase.LOST] < 480 * 4.0


def test_progress_that_was_journaled_late_does_not_count_as_standstill(tmp_path: Path):
    story = replaced(tmp_path / "12")
    story.runs(160)
    attempt = story.state.attempt
    assert attempt is not None
    story.see(e.StandbySeen(node="n1", ready=1))
    story.train(attempt.name, 161, 165, journal=False)  # the daemon has reported 160
    story.dies(1)
    story.see(e.MembersJoined(attempt=attempt.name, generation=3, step=165, at=story.now + 2, kept=7))
    story.train(attempt.name, 166, 180)
    book = ledger(load(story.folder))
    assert book.steps_kept == 180
    assert book.downtime("12-i001") < 10.0


def test_steps_that_are_made_again_are_counted(tmp_path: Path):
    story = replaced(tmp_path / "12")
    story.runs(220)
    story.see(e.StandbySeen(node="n1", ready=1))
    story.dies(0)
    story.joins(kept=7, repeated=2)
    story.runs(240)
    report = build(load(story.folder))
    assert (report.incidents[1].steps_repeated, report.incidents[1].ranks_replaced) == (2, (0,))
    assert report.ledger.steps_discarded == 2
    assert "2 steps were made again." in report.incidents[1].what_became
    assert "A warm process on n1 took its place." in report.incidents[1].what_became
    assert report.attempts[0].generation == 3


def test_mlflow_keeps_one_run_and_tells_generations(record: LineageRecord, report: LineageReport):
    runs = {run.run: run for run in content.mlflow_runs(record, report, {})}
    assert list(runs) == ["", "12.00"]
    assert runs[""].tags["opt.in_place"] == "1"
    assert runs["12.00"].tags["opt.generations"] == "12.00-a0:2 12.00-a1:2"
    assert runs["12.00"].tags["opt.nodes"] == "n1 n2 n3 n4 n5"
    spent = [each.value for each in content.ledger_samples(report) if each.key == "spent/recoveries_in_place"]
    assert spent == [1.0, 1.0, 1.0]


def test_alerts_tell_who_took_over_and_why_nobody_did(told: Lived):
    alerts = {name: alert.told for name, alert in told.state.alerts.items()}
    opened = next(each for name, each in alerts.items() if "12-i000" in name and "opened" in name)
    assert "action: replace ranks 2–3 while all others keep running" in opened.body
    assert opened.severity is Severity.WARNING
    closed = next(each for name, each in alerts.items() if "12-i000" in name and "closed" in name)
    assert closed.title == "opt-ops 12: 12-i000 is recovered in place, proven"
    assert "The other 6 processes stayed." in closed.body
    fell_back = next(each for name, each in alerts.items() if "12-i002" in name and "fell_back" in name)
    assert fell_back.severity is Severity.WARNING
    assert f"Rank 7 on n4 was not replaced in place: {BOTH}." in fell_back.body
    assert not any("fell_back" in name for name in alerts if "12-i000" in name)


def test_hours_of_a_node_end_when_another_takes_its_place(record: LineageRecord):
    uses = {name: part.uses for name, part in parts(record.entries).items()}
    intended = next(each.ts for each in record.entries if isinstance(each.event, e.MembersIntended))
    ended = next(each.ts for each in record.entries if isinstance(each.event, e.AttemptEnded))
    assert uses["n2"][0][1] == intended
    assert uses["n5"][0] == (intended, ended)
