"""The story: folding is a partition, its costs are the ledger's, and the same journal gives the same story."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings

from chronicles.ledger.legs import legs_of
from chronicles.ledger.wall_clock import TimePhase
from chronicles.logbook.entries.build import entries
from chronicles.logbook.story.build import story
from chronicles.logbook.story.fold import bare
from chronicles.logbook.story.model import Fold, Story
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.encode import encode
from chronicles.report.model import LineageReport
from tests.chronicles.eventful import eventful
from tests.chronicles.rambling import courses, told
from tests.chronicles.record import LINEAGE


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


@settings(max_examples=25, deadline=None)
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
