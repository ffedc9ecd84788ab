"""A lineage that ended before an incident was over: the logbook does not wait for what will never be known."""

from __future__ import annotations

from pathlib import Path

from chronicles.logbook.entries.incidents import facts
from chronicles.logbook.front_page import known_status
from chronicles.record import load
from chronicles.report.build import build
from chronicles.report.incident import incidents
from opt_ops.core import events as e
from opt_ops.runfolder.journal import Journal
from tests.core.story import Story


def told(folder: Path, story: Story) -> tuple[dict[str, str], str]:
    """The facts of the lineage's last incident, and its status as the logbook's head has it."""
    journal = Journal(folder / "journal")
    for entry in story.entries[len(journal.entries) :]:
        journal.append(journal.stamp(entry.event, entry.ts))
    journal.close()
    record = load(folder)
    return {each.label: each.text for each in facts(record, incidents(record)[-1])}, known_status(build(record))


def test_an_incident_that_a_stop_has_cut_short_waits_for_nothing(tmp_path: Path):
    story = Story().training(450)
    story.rank_dies(450)
    found, status = told(tmp_path / "a" / "12", story)
    assert (found["Cost"], found["Proof"]) == ("Not known yet.", "Not known yet.")
    assert status.startswith("RECOVERING, as of ")
    story.see(e.StopRequested(request="r9", author="ann", reason="enough"))
    assert story.state.ended
    found, status = told(tmp_path / "b" / "12", story)
    assert found["Cost"] == found["Proof"] == "Stopped by ann before it was proven."
    assert status == "CANCELLED"
