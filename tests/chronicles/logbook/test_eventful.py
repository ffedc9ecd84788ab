"""A lineage to which everything happens, told by the real `decide`: nothing is left out or sounds as it was not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chronicles.ledger.wall_clock import TimePhase, ledger
from chronicles.logbook.entries import incidents
from chronicles.logbook.entries.build import entries
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import front_page
from chronicles.logbook.render import render
from chronicles.mlflow_mirror import content
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import lineage
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import duration
from opt_ops.core import events as e
from opt_ops.core.health.lemons import parts, records
from opt_ops.core.values import Action, Deduplicated, Driver, Outcome, PlannedChange, Severity
from tests.chronicles.eventful import eventful
from tests.chronicles.logbook.test_injection import Page
from tests.chronicles.told import Told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eventful(tmp_path_factory.mktemp("runs") / "12").folder


@pytest.fixture(scope="module")
def record(folder: Path) -> LineageRecord:
    return load(folder)


@pytest.fixture(scope="module")
def report(record: LineageRecord) -> LineageReport:
    return build(record)


@pytest.fixture(scope="module")
def log(record: LineageRecord, report: LineageReport) -> dict[str, LogEntry]:
    """By title, without time."""
    return {entry.heading.partition(" UTC ")[2]: entry for entry in entries(record, report)}


@pytest.fixture(scope="module")
def drawn(folder: Path) -> tuple[str, str]:
    markdown, html, _ = render(folder)
    return markdown.read_text(), html.read_text()


def told_of(entry: LogEntry) -> dict[str, str]:
    return {fact.label: fact.text for fact in entry.facts}


def of_kind(report: LineageReport, kind: str) -> IncidentReport:
    return next(row for row in report.incidents if row.kind == kind)


def test_everything_has_its_entry(log: dict[str, LogEntry]):
    assert [title for title in reversed(log) if "waiting for nodes" not in title] == [
        "[ann]: 12.00 started",
        "[opt-ops]: 12.00 cancelled orphan job 4099",
        "[opt-ops]: 12.00 restarted: no step for 41 s in training (timeout 30 s)",
        "[opt-ops]: 12.00 restarted without n3: no step for 41 s in training (timeout 30 s)",
        "[opt-ops]: 12.00 restarted without n2: xid_79",
        "[opt-ops]: 12.00 shrank to 3 of 4 nodes",
        "[opt-ops]: 12.00 requested 1 node, job 4102",
        "[opt-ops]: 12.00 grew from 3 to 4 nodes",
        "[bob]: 12.00 paused",
        "[bob]: 12.00 resumed",
        "[opt-ops]: 12.00 requested 5 nodes, job 4103",
        "[ann]: 12.01 rolled back 46 steps to step 424, learning rate × 0.75, 60 batches skipped",
        "[ann]: 12.02 changed: learning rate 6e-5, optim.clip_norm=0.5",
        "[cy]: 12.02 excluded p5",
        "[cy]: 12.02 allowed p5 again",
        "[cy]: 12.02 took over",
        "[opt-ops]: 12.02 would have rolled back to step 424, learning rate × 0.75: loss spike at step 560 (advisory)",
        "[cy]: 12.02 handed back to opt-ops",
        "[opt-ops]: 12.02 requested 4 nodes, job 4104",
        "[opt-ops]: 12.02 moved to other nodes: time limit",
        "[opt-ops]: 12.02 alert, no action: save failed at step 600",
        "[opt-ops]: 12.02 restarted: rank 3 on q2 left with code 84",
        "[opt-ops]: 12.02 halted: rank 3 on q2 left with code 84",
        "[opt-ops]: 12.02 halted, an operator was needed",
        "[opt-ops]: 12.02 an alert was NOT delivered",
        "[ann]: 12.02 resumed after a halt",
        "[opt-ops]: 12.02 requested 5 nodes, job 4105",
        "[opt-ops]: 12.02 completed",
    ]


def test_settings_are_a_diff(log: dict[str, LogEntry]):
    by_hand = log["[ann]: 12.02 changed: learning rate 6e-5, optim.clip_norm=0.5"]
    assert by_hand.quote == "clip harder"
    assert ("optim.clip_norm", "1", "0.5") in by_hand.changes
    assert ("learning rate at 481", "4.32474e-4", "6e-5") in by_hand.changes
    assert "are as requested" in told_of(by_hand)["Proof"], "not unchanged: clipping was changed"
    back = log["[ann]: 12.01 rolled back 46 steps to step 424, learning rate × 0.75, 60 batches skipped"]
    assert back.quote == "the bend at 440\nlooks wrong"
    assert ("skipped batches", "none", "425 to 484") in back.changes
    assert "are unchanged" in told_of(back)["Proof"]


def test_a_pause_says_where_and_how_long(log: dict[str, LogEntry]):
    assert told_of(log["[bob]: 12.00 paused"])["Paused"].endswith("at step 425. The nodes are released.")
    resumed = told_of(log["[bob]: 12.00 resumed"])
    assert resumed["Paused"] == "For 2 h 0 min."
    assert resumed["Resumed"].startswith("From the checkpoint of step 424, as attempt 12.00-a5 at ")


def test_planned_moves_do_not_look_like_failures(report: LineageReport, drawn: tuple[str, str]):
    planned = [row.kind for row in report.incidents if row.planned]
    assert planned == ["nodes_returned", "time_limit"]
    lead = front_page(report, None).lead
    assert "6 incidents: 4 proven, 1 answered by an operator, 1 advisory only" in lead
    assert "; 2 planned moves; 2 requested changes. " in lead
    assert drawn[0].count("**PLANNED**") == 2
    assert drawn[0].count("**REQUESTED**") == 2


def test_a_job_that_ran_into_its_limit_is_a_failure(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    incident = told.incident(
        "time_limit", "job 77 ended: TIMEOUT", "12.00-a0", 50, signal="time_limit/act/12.00-a0/None"
    )
    told.decide(incident, Action.RESTART, save_first=True)
    report = build(load(told.folder))
    assert report.incidents[0].planned is False
    assert incidents.title(load(told.folder), report.incidents[0]) == "restarting: job 77 ended: TIMEOUT"


def test_stacks_name_the_odd_ranks(report: LineageReport, log: dict[str, LogEntry], drawn: tuple[str, str]):
    stacks = of_kind(report, "hang").stacks
    assert stacks is not None
    assert (stacks.odd, stacks.silent, stacks.nodes) == ((5, 7), (7,), ("n3",))
    assert stacks.groups[0].ranks == (0, 1, 2, 3, 4, 6)
    assert len(stacks.groups[0].frames) == 4, "all of them, for programs"
    entry = log["[opt-ops]: 12.00 restarted: no step for 41 s in training (timeout 30 s)"]
    assert [(ranks, odd) for ranks, _, odd in entry.stacks] == [("0–4, 6", False), ("5", True), ("7", True)]
    assert "Ranks 5, 7 (on n3) are not where the others are. Rank 7 did not answer." in told_of(entry)["Stacks"]
    assert "| **5** | data.py:\\_\\_next\\_\\_ ← \\<script\\>alert(1)\\</script\\>\\|\\`x\\`:read" in drawn[0]
    assert [tag for tag, _ in Page(drawn[1]).tags].count("script") == 3, "ours, and the numbers of the curves"
    assert drawn[1].count('<tr class="odd">') == 2 * 2


def test_advice_is_never_written_as_an_action(log: dict[str, LogEntry], report: LineageReport, drawn: tuple[str, str]):
    (entry,) = [entry for title, entry in log.items() if "(advisory)" in title]
    assert set(told_of(entry)) == {"Cause", "Confidence", "Evidence", "Data", "Advice", "Notified"}
    assert "Nothing was done, because an operator drove." in told_of(entry)["Advice"]
    row = of_kind(report, "loss_spike")
    assert (row.advisory, row.proven, row.next_attempt, row.steps_discarded) == (True, None, None, None)
    assert "| would rollback × 0.75 | – | – | – |" in drawn[0]


def test_a_halt_tells_what_was_tried_and_who_answered(log: dict[str, LogEntry], report: LineageReport):
    halted = told_of(log["[opt-ops]: 12.02 halted, an operator was needed"])
    assert halted["Cause"].startswith("Rank 3 on q2 left with code 84. 1 try around this step did not help; ")
    assert halted["Tried"] == "12-i008 out of memory: restart, proven."
    assert halted["Answered"].startswith("By ann at ")
    assert "Notified" not in halted, "the page was not delivered"
    assert told_of(log["[ann]: 12.02 resumed after a halt"])["Halted"].startswith("For 1 h 0 min. ")
    (halt,) = report.halts
    assert (halt.incident, halt.answered_by) == ("12-i009", "ann")
    last = report.incidents[-1]
    assert (last.answered, last.proven, last.notified_at) == (True, None, None)
    assert last.closed is not None
    assert front_page(report, None).lead.rpartition(". ")[2] == "An operator was needed once."


def test_alerts_that_arrived_are_a_line_and_others_an_entry(log: dict[str, LogEntry], report: LineageReport):
    lost = [row for row in report.alerts if row.delivered is False]
    assert [(row.severity, row.why) for row in lost] == [("page", "HTTP 503 from <the pager>")]
    assert told_of(log["[opt-ops]: 12.02 an alert was NOT delivered"])["Cause"] == (
        "HTTP 503 from <the pager>. Delivery was tried for 1 h 0 min."
    )
    assert all(row.notified_at for row in report.incidents[:-1])
    moved = told_of(log["[opt-ops]: 12.02 moved to other nodes: time limit"])
    assert moved["Notified"].startswith("On-call was notified at ")


def test_a_page_because_of_missing_nodes_has_an_entry_of_its_own(told: Told):
    told.begin().plan("12.00")
    intended = e.AlertIntended(
        alert="12/waiting/1.000", severity=Severity.PAGE, title="t", body="No attempt has run.\nx"
    )
    told.see(intended)
    record = load(told.folder)
    assert not any("waiting for nodes" in entry.heading for entry in entries(record, build(record)))
    told.see(e.AlertSettled(alert="12/waiting/1.000", delivered=True, why=""))
    entry = entries(load(told.folder), build(load(told.folder)))[0]
    assert entry.heading.endswith("12.00 waiting for nodes, on-call was paged")
    assert told_of(entry)["Cause"] == "No attempt has run."


def test_requests_are_listed_with_the_refused_ones(report: LineageReport):
    asked = [(row.author, row.verb, row.what) for row in report.operator_requests]
    assert asked == [
        ("ann", "start", "start"),
        ("bob", "pause", "pause"),
        ("bob", "resume", "resume"),
        ("ann", "change", "roll back to step 430, learning rate × 0.75, 60 batches skipped"),
        ("ann", "change", "learning rate 6e-5, optim.clip_norm=0.5"),
        ("cy", "exclude", "exclude p5"),
        ("cy", "allow", "allow attempts on p5 again"),
        ("cy", "drive", "took over: opt-ops watches and advises"),
        ("cy", "pause", "pause"),
        ("cy", "drive", "handed back to opt-ops"),
        ("ann", "resume", "resume"),
    ]
    assert [row.refused for row in report.operator_requests if row.refused] == ["<b>no</b>"]


def test_allocations_and_the_jobs_of_attempts(record: LineageRecord, report: LineageReport):
    rows = {row.job: row for row in report.allocations}
    assert rows["4101"].nodes == ("n1", "n2", "n3", "n4", "n5"), "also when it has ended"
    assert rows["4102"].why.startswith("3 of 5 nodes")
    assert rows["4103"].reason == "TIMEOUT"
    assert all(row.ended for row in rows.values())
    jobs = {row.attempt: row.jobs for row in report.attempts}
    assert jobs["12.00-a3"] == ("4101",)
    assert jobs["12.00-a4"] == ("4101", "4102"), "nodes of two allocations"
    assert jobs["12.02-a1"] == ("4104",)
    runs = content.mlflow_runs(record, report, {})
    assert [run.tags.get("opt.jobs") for run in runs] == [None, "4101 4102 4103", "4103", "4103 4104 4105"]
    assert runs[-1].status == "FINISHED", "a halt is not the end"


def test_the_pause_ends_with_the_request_to_go_on(record: LineageRecord):
    book = ledger(record)
    assert book.phases[TimePhase.PAUSED] == pytest.approx(7200, abs=30)
    assert book.phases[TimePhase.QUEUED] == pytest.approx(600, abs=120), "then it waits for nodes"
    assert book.phases[TimePhase.HALTED] == pytest.approx(3600, abs=30)
    assert book.downtime(TimePhase.PAUSED) == book.phases[TimePhase.PAUSED]
    assert sum(book.phases.values()) == pytest.approx((record.as_of or 0) - (record.started or 0))
    assert book.downtime("12-i009") > 0, "what the halt's incident cost beside the wait for a person"
    assert book.phases[TimePhase.OTHER] < 10


def test_links_lead_to_places_on_the_page(drawn: tuple[str, str]):
    page = Page(drawn[1])
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= places


def test_a_node_that_an_operator_excluded_links_to_nothing(told: Told):
    told.begin().plan("12.00").hold()
    told.see(e.NodeExcluded(node="n2", incident="operator", reason="loud fan", request="x", author="cy"))
    html = render(told.folder)[1].read_text()
    assert '<td class="nowrap" data-label="Excluded by">operator</td>' in html
    assert "#operator" not in html


@pytest.mark.parametrize(
    ("driver", "lead"),
    [
        (Driver.OPERATOR, "An operator drives: opt-ops watches and advises."),
        (Driver.SHADOW, "Only watched (shadow mode): opt-ops touches nothing, and what it decides is advice."),
    ],
)
def test_who_drives_is_on_the_front_page(told: Told, driver: Driver, lead: str):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.see(e.DriverChanged(request="d", author="cy", driver=driver, reason=""))
    assert lead in front_page(build(load(told.folder)), None).lead


def test_in_the_middle_of_a_pause(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.see(e.PauseRequested(request="p", author="bob", reason="power work", keep_nodes=True))
    markdown = render(told.folder)[0].read_text()
    assert "[bob]: 12.00 pausing after one more checkpoint" in markdown
    assert "The nodes are kept." in markdown
    told.see(e.ResumeRequested(request="r", author="bob", reason=""))
    assert "pause requested, and withdrawn before it began" in render(told.folder)[0].read_text()


def test_a_rest_is_told_on_the_front_page(told: Told):
    told.begin().plan("12.00")
    told.see(e.PauseRequested(request="p", author="bob", reason="power work"))
    told.see(e.LineagePaused(why="bob: power work"))
    report = build(load(told.folder))
    paused = report.paused
    assert paused is not None
    assert (paused.author, paused.reason, paused.keep_nodes) == ("bob", "power work", False)
    assert front_page(report, None).lead.startswith("Paused by bob: power work. ")
    told.see(e.ResumeRequested(request="r", author="bob", reason=""))
    report = build(load(told.folder))
    assert report.paused is None
    assert "waiting for nodes" in front_page(report, None).lead.lower()


def test_many_nodes_do_not_fill_the_page(told: Told):
    names = [f"node{number:03d}" for number in range(124)]
    told.begin().plan("12.00").hold(*names).launch("12.00-a0", None, None, *names).train("12.00-a0", 1, 50)
    told.end("12.00-a0", Outcome.FAILED, 50)
    incident = told.incident("process_death", "rank 1 was killed", "12.00-a0", 50, nodes=("node007",))
    told.decide(incident, Action.RESTART)
    left = [name for name in names if name != "node007"]
    told.launch("12.00-a1", None, incident, *left).train("12.00-a1", 1, 10).close(incident)
    markdown = render(told.folder)[0].read_text()
    assert "- nodes: 124 nodes\n+ nodes: 123 nodes, without node007\n" in markdown
    assert "as attempt 12.00-a1 on 123 nodes." in markdown


def test_every_field_is_in_the_documentation(report: LineageReport):
    documented = (Path(__file__).parents[3] / "docs" / "formats.md").read_text().partition("\n## Chronicle\n")[2]
    known = lineage(report)
    hang = next(row for row in known["incidents"] if row["kind"] == "hang")
    fields = {*known, *hang["stacks"], *hang["stacks"]["groups"][0]}
    fields |= {*known["shape"], *known["goodput"]["seconds_by_phase"]}
    for rows in ("incidents", "runs", "attempts", "allocations", "operators", "halts", "alerts", "worst_nodes"):
        fields |= {field for row in known[rows] for field in row}
    assert [field for field in sorted(fields - {"schema"}) if not re.search(rf"`{field}`", documented)] == []
    json.dumps(known, allow_nan=False)


def test_every_time_in_the_report_is_iso_8601(report: LineageReport):
    def numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for name, item in value.items():
                if name not in ("evidence", "arguments"):  # as a detector or an operator wrote them
                    yield from numbers(item, name)
        elif isinstance(value, list):
            for item in value:
                yield from numbers(item, key)
        elif isinstance(value, (int, float)):
            yield key, value

    assert [key for key, number in numbers(lineage(report)) if number > 1e9] == []


def test_notes_and_corrections_stand_below_what_they_are_about(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    incident = told.incident("process_death", "killed", "12.00-a0", 50)
    told.see(
        e.NoteAdded(request="a", author="ann", target=incident, text="it was the switch", correction=True),
        e.NoteAdded(request="b", author="bob", target="12-e2", text="begun a day late"),
        e.NoteAdded(request="c", author="cy", target="12-e999", text="about nothing there is"),
        e.NoteAdded(request="d", author="dee", target="12.00", text="smooth"),
    )
    record = load(told.folder)
    report = build(record)
    log = {entry.anchor: entry for entry in entries(record, report)}
    assert [(r.author, r.text, r.correction) for r in log[incident].remarks] == [("ann", "it was the switch", True)]
    assert [r.author for r in log["e2"].remarks] == ["bob"], "on the entry of the start"
    assert [entry.quote for entry in log.values() if entry.quote] == ["smooth", "about nothing there is"], "no entry"
    assert report.incidents[0].corrected is True
    markdown, html, _ = render(told.folder)
    assert "**Correction by ann, " in markdown.read_text()
    assert "it was the switch</blockquote>" in html.read_text()


def test_what_was_removed_from_the_text_stands_in_the_first_entry(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    removed = {"exact": 296, "near": 304, "contaminated": 3, "corrupt": 1}
    clean = Deduplicated(
        source="clean",
        digest="sha256:9f86d081884c",
        threshold=0.95,
        documents_in=4053,
        documents_out=3449,
        removed=removed,
    )
    known = next(x.event for x in load(told.folder).entries if isinstance(x.event, e.AttemptConfigured))
    told.see(replace(known, dedup=(clean,)))
    record = load(told.folder)
    first = entries(record, build(record))[-1]
    (fact,) = [fact for fact in first.facts if fact.label == "Deduplicated"]
    assert fact.text.startswith("clean: 3449 of 4053 documents stayed. Removed: 296 exact copies, 304 near copies")
    assert "3 that share text with test sets" in fact.text


def test_other_versions_at_a_launch_are_an_entry_by_themselves(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50).end("12.00-a0", Outcome.FAILED, 50)
    told.launch("12.00-a1")
    again = e.AttemptConfigured(
        attempt="12.00-a1",
        steps=400,
        schedule=told.schedule,
        optimizer=told.state.attempts["12.00-a0"].optimizer,  # type: ignore[arg-type]
        versions={"python": "3.11.7", "torch": "2.14.0", "code": "abc"},
        layout={},
    )
    assert not [x for x in entries(load(told.folder), build(load(told.folder))) if "versions" in x.heading]
    told.see(again)
    record = load(told.folder)
    (entry,) = [x for x in entries(record, build(record)) if "versions" in x.heading]
    assert entry.heading.endswith("12.00 versions changed: torch, code")
    assert entry.changes == (("torch", "2.13.0", "2.14.0"), ("code", "", "abc"))


def test_the_front_page_says_when_it_will_end_and_what_is_open(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 100)
    told.see(e.NoteAdded(request="a", author="ann", target="12.00", text="why so slow?"))
    report = build(load(told.folder))
    first = front_page(report, None)
    end = next(figure for figure in first.figures if figure.label == "Expected end")
    left = 300 / (report.ledger.goodput or 0.0)
    assert end.more == f"in {duration(left)}, at this goodput"
    assert first.questions == ["ann asks about 12.00: why so slow?"]
    told.see(e.NoteAdded(request="b", author="bob", target="12.00", text="the disks"))
    assert front_page(build(load(told.folder)), None).questions == []


def test_the_worst_nodes_are_those_of_the_ledger_of_nodes(report: LineageReport, record: LineageRecord):
    ledger = [each for each in records(parts(record.entries), record.as_of or 0.0) if each.failures]
    expected = [(each.part.key, len(each.failures), each.expected) for each in ledger if each.part.kind == "node"]
    rows = report.lemon_nodes
    assert [(row.node, row.failures, row.expected) for row in rows] == expected
    (row,) = rows
    assert (row.node, row.kinds, row.parts, row.now) == ("n2", {"bad_gpu": 1}, {"GPU-2": 1}, "excluded")
    (bad_gpu,) = (each for each in report.incidents if each.kind == "bad_gpu")
    assert (row.last, row.node_hours_lost) == (bad_gpu.incident, bad_gpu.node_hours_lost)
    (shown,) = front_page(report, None).lemons
    assert shown.what == "Bad GPU"


def test_every_incident_says_how_sure_its_cause_is(report: LineageReport):
    sure = {row.kind: row.confidence for row in report.incidents}
    assert sure == {
        "hang": "medium",  # the stacks show an odd rank
        "bad_gpu": "high",
        "nodes_returned": "high",
        "operator": "certain",
        "loss_spike": "low",
        "time_limit": "high",
        "out_of_memory": "high",
    }


def test_a_declared_change_has_an_entry(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    planned = (PlannedChange(step=48_000, what="stage b", by="ann"), PlannedChange(step=60, by="ann"))
    told.see(e.ChangesDeclared(request="s", author="ann", reason="the mix", planned=planned))
    markdown = render(told.folder)[0].read_text()
    assert "[ann]: 12.00 declared 2 planned changes" in markdown
    assert "from step 48,000 on: stage b; from step 60 on: a change" in markdown
