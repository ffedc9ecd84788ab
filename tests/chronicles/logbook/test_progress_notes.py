"""The progress note and the hand-over: what was known at that moment, and nothing of others' markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chronicles.logbook.notes.handover import handover
from chronicles.logbook.notes.handover_text import handover_text
from chronicles.logbook.notes.update import moment_of, update
from chronicles.record import LineageRecord, load, until
from chronicles.report.build import build
from tests.chronicles.eventful import eventful
from tests.chronicles.logbook.test_injection import HOSTILE, hostile
from tests.chronicles.logbook.test_logbook import crowded
from tests.chronicles.told import Told, spiked


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    return load(eventful(tmp_path_factory.mktemp("runs") / "12").folder)


def test_a_note_tells_what_has_happened_since_the_one_before(record: LineageRecord):
    text = update(record, 0.64, 0.27)
    assert text.startswith("# Lineage 12: 64 % update\n\n2026-11-18 15:18 UTC, run 12.02, step 640 of 1000.")
    assert "Since the 27 % update (2026-11-18 11:34 UTC), 370 steps were trained in 3 h 44 min" in text
    assert "the loss went from 2.218 to 2.038." in text
    assert "7 incidents" in text, "three came before"
    assert "An operator was needed once." in text
    assert "| kept steps | 370 | 640 |" in text, "as the sentence says: the journal's reports are a minute apart"
    assert "Most of the time lost since then: paused 2 h 0 min, halted 1 h 0 min" in text


def test_a_note_about_an_earlier_moment_knows_no_more_than_then(record: LineageRecord):
    text = update(record, 0.27, 0.0)
    assert "3 incidents: hang × 2, GPU fault." in text
    assert "12-i002 has been open since" in text, "it was proven later"
    assert "No operator was needed." in text


def test_until_is_what_was_written_until_then(record: LineageRecord):
    ends = moment_of(record, 270)
    assert ends is not None
    then = until(record, ends)
    assert len(then.entries) < len(record.entries)
    assert max(point.ts for part in then.curves for point in part.points) == ends
    assert build(until(record, record.entries[-1].ts)) == build(record)


def test_more_than_is_trained_is_refused(told: Told):
    spiked(told)
    with pytest.raises(ValueError, match=r"140 of 400 steps are trained, which is less than 50 %"):
        update(load(told.folder), 0.5, 0.0)


@pytest.mark.parametrize("text", HOSTILE)
def test_nobody_elses_markup_gets_through(tmp_path: Path, text: str):
    record = load(hostile(tmp_path / "12", text).folder)
    for note in (handover_text(handover(record, hours=100)), update(record, 0.05, 0.0)):
        assert not re.search(r"(?<!\\)(?:<script|<img|\]\(javascript:)|\x1b|\n# heading", note)


def test_a_note_counts_once_what_one_attempt_answers(told: Told):
    crowded(told).train("12.00-a1", 61, 80)
    text = update(load(told.folder), 0.2, 0.0)
    assert "33 incidents, 2 of which interrupted training: GPU fault × 31, node without heartbeat, loss spike." in text
    assert " 50 steps discarded, " in text
