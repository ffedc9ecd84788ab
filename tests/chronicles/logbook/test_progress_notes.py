"""The progress note and the hand-over: what was known at that moment, and nothing of others' markup."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from chronicles.logbook.notes.handover import handover
from chronicles.logbook.notes.handover_text import handover_text
from chronicles.logbook.notes.moments import known_at, moment_of
from chronicles.logbook.notes.update import row, update, update_text
from chronicles.record import LineageRecord, load, until
from chronicles.report.build import build
from opt_ops.core import events as e
from tests.chronicles.eventful import eventful
from tests.chronicles.logbook.test_handover import drilled, trained
from tests.chronicles.logbook.test_injection import HOSTILE, hostile
from tests.chronicles.logbook.test_logbook import crowded
from tests.chronicles.told import Told, spiked


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    return load(eventful(tmp_path_factory.mktemp("runs") / "12").folder)


def test_a_note_tells_what_has_happened_since_the_one_before(record: LineageRecord):
    text = update_text(update(record, 0.64, 0.27))
    assert text.startswith("# Lineage 12: 64 % update\n\n2026-11-18 15:18 UTC, run 12.02, step 640 of 1000.")
    assert "Since the 27 % update (2026-11-18 11:34 UTC), 370 steps were trained in 3 h 44 min" in text
    assert "the loss went from 2.218 to 2.038." in text
    assert "7 incidents" in text, "three came before"
    assert "An operator was needed once." in text
    assert "| kept steps | 370 | 640 |" in text, "as the sentence says: the journal's reports are a minute apart"
    assert "Most of the time lost since then:\n\n- paused: 2 h 0 min\n- halted: 1 h 0 min\n" in text


def test_a_note_about_an_earlier_moment_knows_no_more_than_then(record: LineageRecord):
    text = update_text(update(record, 0.27, 0.0))
    assert "3 incidents: hang × 2, bad GPU." in text
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
    for note in (handover_text(handover(record, hours=100)), update_text(update(record, 0.05, 0.0))):
        assert not re.search(r"(?<!\\)(?:<script|<img|\]\(javascript:)|\x1b|\n# heading", note)


def test_a_note_counts_once_what_one_attempt_answers(told: Told):
    crowded(told).train("12.00-a1", 61, 80)
    text = update_text(update(load(told.folder), 0.2, 0.0))
    assert "33 incidents, 2 of which interrupted training: bad GPU × 31, node without heartbeat, loss spike." in text
    assert " 50 steps discarded, " in text


# ---- figures: the columns of two notes add up ---------------------------------------------------------------------


def figures(text: str) -> dict[str, tuple[float, float]]:
    """Label → (since then, so far), of the table of numbers; times in seconds. Goodput is a share and does not add."""
    rows = re.findall(r"^\| ([^|]+?) \| ([\d:,.]+) \| ([\d:,.]+) \|$", text, re.MULTILINE)
    return {label: (number(since), number(all_of_it)) for label, since, all_of_it in rows}


def number(text: str) -> float:
    hours, minutes, seconds = text.split(":") if ":" in text else ("0", "0", text.replace(",", ""))
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize("shares", [(0.27, 0.64), (0.133, 0.4455, 0.452), (0.05, 0.05 + 1e-3, 0.999)], ids=str)
def test_since_then_and_the_earlier_so_far_give_so_far(record: LineageRecord, shares: tuple[float, ...]):
    before = figures(update_text(update(record, shares[0], 0.0)))
    assert len(before) == 12
    for earlier, share in pairwise(shares):
        now = figures(update_text(update(record, share, earlier)))
        for label, (since, so_far) in now.items():
            assert before[label][1] + since == pytest.approx(so_far, abs=1e-9), label
        before = now


def test_times_come_from_telemetry_where_the_journal_reports_once(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    record = load(told.folder)
    half, quarter = update(record, 0.5, 0.25), update(record, 0.25, 0.0)
    assert (half.since_then.kept_steps, half.since_then.wall_seconds) == (100, pytest.approx(100.0))
    assert half.since_then.node_hours == pytest.approx(3 * 100 / 3600)
    assert quarter.so_far.wall_seconds == pytest.approx(quarter.end - (record.started or 0.0))


def test_a_note_stays_true_after_a_rollback_of_its_steps(told: Told):
    record = load(spiked(told).folder)
    then = known_at(record, moment_of(record, 130) or 0.0)
    assert max(point.step for curve in then.curves for point in curve.points) == 130
    assert update(then, 0.325, 0.0).so_far == update(record, 0.325, 0.0).so_far
    assert update(record, 0.325, 0.0).so_far.discarded_steps == 0, "the rollback came later"


def test_drills_are_counted_apart_and_marked(told: Told):
    trained(told)
    dead = drilled(told)
    told.see(e.NoteAdded(request="n", author="bob", target=dead, text="as announced"))
    told.train("12.00-a1", 141, 160)
    note = update(load(told.folder), 0.4, 0.0)
    text = update_text(note)
    assert "1 incident, a drill: " in text
    assert (note.so_far.incidents, note.so_far.drills, note.so_far.failures) == (1, 1, 0)
    caused = [line for line in text.splitlines() if "rank 1" in line or dead in line or "rank died" in line]
    assert len([line for line in caused if "DRILL d003" in line]) == 3, "incident, note, lost time"
    assert "> bob: “as announced”" in text


def test_programs_get_the_figures(record: LineageRecord):
    item = row(update(record, 0.64, 0.27))
    assert (item["share"], item["since_share"], item["since_then"]["kept_steps"]) == (0.64, 0.27, 370)
    assert item["from"] < item["to"]
