"""The story: folding is a partition, its costs are the ledger's, and the same journal gives the same story."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings

from chronicles.ledger.legs import legs_of
from chronicles.ledger.wall_clock import TimePhase
from chronicles.logbook.entries.build import entries
from chronicles.logbook.render import render
from chronicles.logbook.story import measures, model
from chronicles.logbook.story.build import story
from chronicles.logbook.story.fold import bare
from chronicles.logbook.story.model import Fold, Story
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import encode
from chronicles.report.model import LineageReport
from opt_ops.core import events as e
from opt_ops.core.values import Action, AskTerms, Driver, Outcome, Parent
from tests.chronicles.eventful import eventful
from tests.chronicles.rambling import courses, told
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told


def read(folder: Path, telemetry: bool = True) -> tuple[LineageRecord, LineageReport, Story]:
    record = load(folder, telemetry=telemetry)
    report = build(record)
    return record, report, story(record, report, entries(record, report))


def check(record: LineageRecord, report: LineageReport, found: Story) -> None:
    """What holds of every story."""
    anchors = [entry.anchor for entry in entries(record, report)]
    members = [anchor for entry in found.entries for anchor in entry.members]
    assert Counter(members) == Counter(anchors), "each entry of the evidence is in exactly one entry of the story"
    for entry in found.entries:
        assert entry.anchor in entry.members
        assert entry.begin <= entry.end
        assert (len(entry.members) == 1) == (entry.rule is Fold.SINGLE)
        drills = {each.drill is not None for each in entry.entries if each.incident}
        assert len(drills) < 2, "drills are told with drills only"
    assert max((len(list(same)) for _, same in groupby(bare(e.title) for e in found.entries)), default=0) <= 3
    _costs(record, report, found)


def _costs(record: LineageRecord, report: LineageReport, found: Story) -> None:
    """Steps and seconds of all entries together are the ledger's: no standstill counts twice, none is left out."""
    assert sum(entry.steps_lost or 0 for entry in found.entries) == report.ledger.steps_discarded
    stepped = [leg for leg in legs_of(record.entries, record.state) if leg.reports]
    if not stepped:
        return
    phases = report.ledger.seconds_by_phase
    stood = sum(seconds for phase, seconds in phases.items() if phase not in (TimePhase.KEPT, TimePhase.LOST))
    before = stepped[0].reports[0][1] - (record.started or 0.0)
    after = (record.started or 0.0) + report.ledger.wall_seconds - stepped[-1].reports[-1][1]
    assert sum(entry.seconds_down or 0.0 for entry in found.entries) == pytest.approx(stood - before - after, abs=0.1)


@settings(max_examples=12, deadline=None)
@given(courses)
def test_folding_is_a_partition_and_its_costs_are_the_ledgers(course: list[tuple[str, int, float]]):
    with tempfile.TemporaryDirectory() as folder:
        check(*read(told(Path(folder), course), telemetry=False))


def test_the_same_journal_gives_the_same_story(tmp_path: Path):
    folder = told(tmp_path, [("died", 30, 45.0), ("dead on arrival", 20, 2.0), ("halt", 9, 900.0), ("note", 5, 2.0)])
    assert encode(read(folder)[2]) == encode(read(folder)[2])


def test_the_story_of_a_recorded_lineage(tmp_path: Path):
    check(*read(LINEAGE))
    check(*read(eventful(tmp_path / "12").folder))


def titles(found: Story) -> list[str]:
    return [entry.title for entry in found.entries]


def test_launches_that_fail_before_their_first_step_are_told_with_what_launched_them(tmp_path: Path):
    found = read(told(tmp_path, [("dead on arrival", 30, 2.0)]))[2]
    chain = next(entry for entry in found.entries if len(entry.members) > 1)
    assert len(chain.members) == 2
    assert chain.title.startswith("Two dead ranks within a minute (n30): two restarts")
    assert chain.seconds_down is not None
    assert chain.seconds_down < 20, "one standstill"


def test_a_halt_is_told_with_its_answer(tmp_path: Path):
    found = read(told(tmp_path, [("died", 60, 2.0), ("halt", 60, 900.0)]))[2]
    halt = next(entry for entry in found.entries if "halt" in entry.kinds)
    assert {"halted, an operator was needed", "resumed after a halt"} <= {each.title for each in halt.entries}
    assert any("ann answered after 50 min: “mended”" in sentence for sentence in halt.text)


def test_routine_of_a_day_is_one_entry_and_quiet_days_are_one(tmp_path: Path):
    course = [("died", 51, 900.0), ("silent", 52, 900.0), ("died", 53, 900.0), ("silent", 54, 900.0)]
    course += [("died", 55, 100_000.0), ("silent", 56, 900.0), ("died", 57, 100_000.0), ("died", 58, 900.0)]
    found = read(told(tmp_path, course))[2]
    assert [entry.rule for entry in found.entries] == [Fold.SINGLE, Fold.SINGLE, Fold.SINGLE, Fold.DAY, Fold.QUIET]
    day, quiet = found.entries[-2:]
    assert not day.large
    assert not quiet.large
    assert len(quiet.members) == 4
    assert "three dead ranks and one silent node" in quiet.title


def test_drills_do_not_count_as_the_first_of_their_class(tmp_path: Path):
    found = read(told(tmp_path, [("drill", 60, 2.0), ("died", 60, 900.0)]))[2]
    drill, real = (entry for entry in found.entries if any(each.incident for each in entry.entries))
    assert drill.title.startswith("DRILL d001: ")
    assert "drill" in drill.kinds
    assert "first" not in drill.title
    assert real.first
    assert real.title.endswith("The first dead rank of this lineage.")


def test_few_incidents_are_one_paragraph_and_many_are_phases(tmp_path: Path):
    few = read(told(tmp_path / "few", [("died", 60, 900.0), ("rollback", 30, 900.0)]))[2]
    assert len(few.summary) == 1
    assert "Rolled back" in few.summary[0].text
    course = [("died", 60, 90_000.0), ("rollback", 30, 900.0), ("hung", 60, 90_000.0), ("silent", 60, 90_000.0)] * 3
    many = read(told(tmp_path / "many", [*course, ("halt", 60, 90_000.0)]))[2]
    assert 4 <= len(many.summary) <= 13
    assert many.words == sum(len(f"{each.title} {each.text}".split()) for each in many.summary) <= 600
    assert all(len(f"{each.title} {each.text}".split()) <= 100 for each in many.summary)


def test_a_live_lineage_begins_with_now(tmp_path: Path):
    course = [("died", 60, 90_000.0), ("rollback", 30, 900.0), ("hung", 60, 90_000.0), ("silent", 60, 90_000.0)] * 3
    found = read(told(tmp_path, course))[2]
    phases = [paragraph for paragraph in found.summary if paragraph.begin is not None and paragraph.anchors]
    assert [paragraph.now for paragraph in phases] == [True, *[False] * (len(phases) - 1)]
    begins = [paragraph.begin for paragraph in phases]
    assert begins == sorted(begins, reverse=True), "the newest first"
    assert "the last step comes at" in phases[0].text


def test_what_a_person_did_again_and_again_is_told_in_words(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold()
    for number in range(6):
        told.see(e.NoteAdded(request=f"n{number}", author="ann", target="12", text=f"fine {number}"), seconds=600)
    _, _, found = read(told.folder)
    assert found.entries[-1].title == "ann wrote a note: “fine 0”, and five more like it within 50 min"


def test_many_stops_of_several_classes_are_neither_quiet_nor_of_one_class(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 30)
    told.save("12.00", 20)
    point = next(iter(told.state.checkpoints.values())).checkpoint
    for number in range(20):
        attempt, kind = f"12.00-a{number}", ("hang", "process_death")[number % 2]
        incident = told.incident(kind, f"trouble {number}", attempt, 30, nodes=("n1",))
        told.decide(incident, Action.RESTART).end(attempt, Outcome.FAILED, 30)
        told.launch(f"12.00-a{number + 1}", point, incident).train(f"12.00-a{number + 1}", 21, 30).close(incident)
        told.see(seconds=600)
    _, _, found = read(told.folder)
    assert "A restless beginning" in " ".join(paragraph.title for paragraph in found.summary)
    assert not [entry.title for entry in found.entries if entry.rule is Fold.BURST and " and " not in entry.title]


def test_a_fork_and_a_wish_to_be_asked_are_whole_sentences(tmp_path: Path):
    parent = Parent(lineage="11", run="11.01", step=20, checkpoint="c")
    told = Told(tmp_path / "12").begin(parent=parent).plan("12.00").hold()
    told.see(e.DriverChanged(request="d", author="ann", driver=Driver.ASK, reason="", ask=AskTerms()))
    titles = [entry.title for entry in read(told.folder)[2].entries]
    assert titles[0] == "ann started as a fork of 11.01 at step 20: opt-tiny on 2 nodes and 1 spare"
    assert titles[-1] == "ann wants to be asked"


def test_of_very_many_incidents_routine_is_told_by_day_and_keeps_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = Told(tmp_path / "12", steps=4000, step_seconds=30.0)
    told.begin().plan("12.00").hold().launch("12.00-a0")
    step = 0
    kinds = (("process_death", "rank 1 died"), ("hang", "no step for 41 s"), ("node_silent", "no heartbeat of n2"))
    for number in range(12):
        attempt = f"12.00-a{number}"
        told.train(attempt, step + 1, step + 60)
        step += 60
        point = told.save("12.00", step)
        kind, cause = kinds[number % 3]
        incident = told.incident(kind, cause, attempt, step, nodes=("n2",))
        told.decide(incident, Action.RESTART).end(attempt, Outcome.FAILED, step)
        told.launch(f"12.00-a{number + 1}", point, incident).train(f"12.00-a{number + 1}", step + 1, step + 2)
        step += 2
        told.close(incident)
    few = render(told.folder)[0].read_text()
    assert few.count("failure of n2") >= 6, "that a node failed again is news"
    for module in (measures, model):
        monkeypatch.setattr(module, "CROWDED", 10)
    markdown, page, report = (path.read_text() for path in render(told.folder))
    assert len(markdown.split()) < len(few.split()) / 2
    assert "opt-ops explain INCIDENT" in markdown
    assert "opt-ops explain INCIDENT" in page
    names = {f"12-i{number:03d}" for number in range(12)}
    assert set(re.findall(r'\bid="(12-i\d+)"', page)) == names, "each can be linked to"
    entries = json.loads(report)["story"]["entries"]
    assert sorted(each for entry in entries for each in entry["members"] if each in names) == sorted(names)
    assert {each["incident"] for each in json.loads(report)["incidents"]} == names
