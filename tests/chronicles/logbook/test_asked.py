"""What was proposed to a person: the logbook says when, who answered, and what the wait was; the ledger counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicles.ledger.wall_clock import Stage
from chronicles.logbook.entries.incidents import facts
from chronicles.logbook.render import render
from chronicles.record import load
from chronicles.report.build import build
from chronicles.report.incident import incidents
from opt_ops.core import events as e
from opt_ops.core.values import Driver, ProposalStatus
from opt_ops.runfolder.journal import Journal
from tests.core.story import Story


def asked(folder: Path, status: ProposalStatus | None) -> Path:
    """A rank dies at step 450; the restart is proposed, and answered after 90 s, or expires after 120 s."""
    story = Story().training(450)
    story.see(e.DriverChanged(request="r1", author="ann", driver=Driver.ASK, reason="my first week"))
    story.rank_dies(450)
    story.ends()
    if status is None:
        story.see(seconds=125)
    else:
        said = e.ProposalAnswered(
            proposal="12-i000-p1", incident="12-i000", status=status, author="bo", reason="seen", step=450, request="r2"
        )
        story.see(said, seconds=90)
    if len(story.state.attempts) > 1:
        story.train(460)
    journal = Journal(folder / "journal")
    for entry in story.entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    journal.close()
    return folder


@pytest.mark.parametrize(
    ("status", "said", "advised"),
    [
        (ProposalStatus.APPROVED, "approved by bo at", False),
        (ProposalStatus.DECLINED, "declined by bo at", True),
        (None, "Nobody answered by", False),
    ],
    ids=["approved", "declined", "expired"],
)
def test_an_entry_says_who_was_asked_and_what_the_wait_was(
    tmp_path: Path, status: ProposalStatus | None, said: str, advised: bool
):
    folder = asked(tmp_path / "12", status)
    record = load(folder)
    found = {each.label: each.text for each in facts(record, incidents(record)[-1])}
    assert found["Asked"].startswith("12-i000-p1 was proposed at ")
    assert said in found["Asked"]
    assert "of waiting, 0 steps)" in found["Asked"]
    assert ("Advice" in found) is advised
    if advised:
        assert "an operator drove" not in found["Advice"]
        assert "declined by bo: seen" in found["Advice"]
    assert found["Asked"] in render(folder)[0].read_text().replace("\n", " ")


@pytest.mark.parametrize(("status", "seconds"), [(ProposalStatus.APPROVED, 90.0), (None, 125.0)], ids=["yes", "none"])
def test_the_ledger_counts_the_wait_beside_the_decision(tmp_path: Path, status: ProposalStatus | None, seconds: float):
    report = build(load(asked(tmp_path / "12", status)))
    spent = report.ledger.seconds_by_stage
    assert spent[Stage.ASKING] == pytest.approx(seconds, abs=2)
    assert spent[Stage.DECIDING] == pytest.approx(0, abs=2)
