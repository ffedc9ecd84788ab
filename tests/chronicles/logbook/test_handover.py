"""The handover: what the next shift needs, in order, with every word that people wrote and every drill marked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chronicles.logbook.notes.handover import Live, handover, row
from chronicles.logbook.notes.handover_text import WORDS, handover_text
from chronicles.record import LineageRecord, load, until
from opt_ops.core import events as e
from opt_ops.core.values import (
    Action,
    AllocationStatus,
    AskDefault,
    Fault,
    Outcome,
    ProposalStatus,
    Severity,
    Tier,
    Verdict,
)
from tests.chronicles.eventful import POLICY, eventful
from tests.chronicles.told import Told

SECTIONS = ["Now", "Needs you", "Tonight", "What happened", "To watch", "Afterthoughts"]
WHY = "power work in hall 2, until the electrician has left, " + "and that may take a while, " * 12


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    return load(eventful(tmp_path_factory.mktemp("runs") / "12").folder)


def section(text: str, name: str) -> str:
    return re.split(rf"^## {name}.*$", text, flags=re.MULTILINE)[1].partition("\n## ")[0]


def trained(told: Told) -> Told:
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 120)
    told.save("12.00", 100)
    return told


def drilled(told: Told) -> str:
    """A rank is killed on purpose, and training goes on; the name of the incident."""
    drill = {"drill": "d003", "fault": Fault.KILL_RANK, "attempt": "12.00-a0", "arguments": {"rank": 1}}
    told.see(e.DrillRequested(request="d", author="ann", **drill), e.DrillDone(drill="d003"))
    dead = told.incident("process_death", "rank 1 was killed", "12.00-a0", 120, drill="d003")
    told.decide(dead, Action.RESTART)
    told.end("12.00-a0", Outcome.FAILED, 120)
    point = next(iter(told.state.checkpoints.values())).checkpoint
    told.launch("12.00-a1", point, dead).train("12.00-a1", 101, 140)
    told.close(dead)
    return dead


def test_sections_stand_in_the_order_in_which_they_are_needed(record: LineageRecord):
    text = handover_text(handover(record, 100))
    assert [line.split(" in the last")[0] for line in re.findall(r"^## (.*)$", text, re.MULTILINE)] == SECTIONS


def test_what_is_open_what_to_watch_and_what_was_done(told: Told):
    trained(told).see(e.NoteAdded(request="a", author="ann", target="12.00", text="this is old"), seconds=1)
    told.now += 7200
    told.train("12.00-a0", 121, 130)
    alert = {"signal": "gradient_norm", "tier": Tier.ALERT, "attempt": "12.00-a0", "step": 125, "onset_step": 120}
    told.see(
        e.SignalRaised(at=told.now, rule="r", evidence={}, **alert),
        e.NodeJudged(node="n3", host="n3", verdict=Verdict.SUSPECT, reason="ecc_corrected", source="NVML", at=told.now),
        e.AlertIntended(alert="x", severity=Severity.PAGE, title="look", body="b"),
        e.AlertSettled(alert="x", delivered=False, why="HTTP 503"),
        e.NoteAdded(request="b", author="bob", target="12.00", text="Is n3 next?"),
    )
    incident = told.incident("hang", "no step for 40 s", "12.00-a0", 130)
    found = handover(load(told.folder), hours=1)
    text = handover_text(found)
    assert "- An alert was not delivered: Look. HTTP 503." in section(text, "Needs you")
    assert "- bob asks about 12.00: Is n3 next?" in section(text, "Needs you")
    assert "- 2 nodes in use, 1 spare." in section(text, "Tonight")
    assert "- The newest good checkpoint is that of step 100, 30 steps back." in section(text, "Tonight")
    assert f"- {incident} has been open since" in section(text, "To watch")
    assert "- alert without an action: gradient norm at step 125, 1.5 s ago." in section(text, "To watch")
    assert "- n3 is suspect: many corrected ECC errors." in section(text, "To watch")
    assert "Incident open: no step for 40 s" in section(text, "What happened")
    assert "this is old" not in text, "two hours old"
    assert (found.suspects, found.spares_held) == (("n3",), 1)
    assert [(alert.signal, alert.step) for alert in found.alerts_open] == [("gradient_norm", 125)]


def test_notes_and_reasons_are_quoted_and_drills_are_marked(told: Told):
    trained(told)
    dead = drilled(told)
    told.see(
        e.NoteAdded(request="n1", author="bob", target="12.00", text="the fan of n1 is loud"),
        e.NoteAdded(request="n2", author="cy", target=dead, text="as announced\nin the chat"),
        e.PauseRequested(request="p", author="ann", reason=WHY),
    )
    found = handover(load(told.folder))
    happened = section(handover_text(found), "What happened")
    for words in ("“the fan of n1 is loud”", "“as announced in the chat”", WHY.strip()):
        assert words in happened
    lines = [line for line in happened.splitlines() if "12-i000" in line or "rank 1" in line]
    assert len(lines) == 2, "the incident, and the note on it"
    assert all(line.count("DRILL d003") == 1 for line in lines), lines
    quoted = {each.quote: each for each in found.happened if each.quote}
    assert quoted["as announced in the chat"].drill == "d003"
    assert quoted["the fan of n1 is loud"].drill is None
    assert (quoted["the fan of n1 is loud"].author, WHY.strip() in quoted) == ("bob", True)
    assert "asked for a pause" in section(handover_text(found), "Tonight")


def test_an_open_proposal_needs_you_until_it_is_answered(told: Told):
    trained(told)
    spike = told.incident("loss_spike", "loss 9.1 at step 120", "12.00-a0", 120)
    decided = e.RecoveryDecided(
        incident=spike, playbook="loss_spike", version=1, rung=0, action=Action.ROLLBACK, why="", lr_factor=0.75
    )
    asked = {"proposal": f"{spike}-p1", "incident": spike, "default": AskDefault.WAIT, "trains": True, "step": 120}
    told.see(e.ProposalMade(decided=decided, deadline=told.now + 600, **asked))
    needs = section(handover_text(handover(load(told.folder))), "Needs you")
    assert f"opt-ops run approve {spike}" in needs
    assert "not done without an answer" in needs
    answer = {"proposal": f"{spike}-p1", "incident": spike, "status": ProposalStatus.DECLINED, "author": "ann"}
    told.see(e.ProposalAnswered(reason="it heals by itself", **answer))
    text = handover_text(handover(load(told.folder)))
    assert "approve" not in section(text, "Needs you")
    assert "“it heals by itself”" in section(text, "What happened")


def test_the_end_is_expected_by_the_newest_pace_whatever_stood_still_before(told: Told):
    trained(told).see(seconds=20 * 3600)  # a night without nodes
    told.train("12.00-a0", 121, 200)
    found = handover(load(told.folder))
    assert found.expected_end is not None
    assert found.as_of + 200 - 1 < found.expected_end.earliest <= found.expected_end.latest < found.as_of + 201
    assert "Expected end without a stop: " in handover_text(found)


def test_tonight_tells_of_time_limits_budgets_and_nodes_that_wait_for_a_test(told: Told):
    trained(told)
    spent = POLICY.playbooks["process_death"].budget.actions - 2
    for _ in range(spent):
        dead = told.incident("process_death", "rank 1 was killed", "12.00-a0", 120, nodes=("n2",))
        told.decide(dead, Action.RESTART)
    told.see(e.NodeExcluded(node="n2", incident=next(iter(told.state.incidents)), reason="it fails again"))
    name, seconds = next(iter(told.state.allocations)), 5 * 3600
    running = {"allocation": name, "status": AllocationStatus.RUNNING, "nodes": ("n1", "n2", "n3"), "reason": ""}
    told.see(e.AllocationChanged(ends_at=told.now + seconds, **running))
    found = handover(load(told.folder), policy=POLICY)
    text = section(handover_text(found), "Tonight")
    assert "- Job 77 reaches its time limit at " in text
    budget = next(each for each in found.budgets if each.kind == "process_death")
    assert (budget.left, budget.of) == (2, spent + 2)
    assert f"- Retry budget process_death: {budget.left} of {budget.of} left until " in text
    assert (found.retests, "opt-ops node allow 12 n2 --retest" in text) == (("n2",), True)
    assert row(found)["time_limits"][0]["job"] == "77"


@pytest.mark.parametrize("hours", [1, 12, 1000])
def test_at_most_400_words_beside_what_people_wrote(record: LineageRecord, hours: int):
    text = handover_text(handover(record, hours, policy=POLICY))
    own = "\n".join(line for line in text.splitlines() if not line.startswith("  > "))
    assert len(own.split()) <= WORDS
    reasons = [entry.event.reason for entry in record.entries if isinstance(entry.event, e.PauseRequested)]
    assert hours < 12 or all(reason in text for reason in reasons)


def test_a_status_that_cannot_be_trusted_says_so_and_why(record: LineageRecord):
    then = until(record, record.entries[len(record.entries) // 2].ts)
    live = Live(now=then.entries[-1].ts + 48, status="TRAINING?", why="nobody watches", watched=False, watcher="")
    text = handover_text(handover(then, live=live))
    assert "**TRAINING?**: nobody watches" in section(text, "Now")
    assert "Nobody watches." in section(text, "Now")


def test_programs_get_every_field(tmp_path: Path, record: LineageRecord):
    fields = row(handover(record))
    assert list(fields)[:20] == [
        "lineage",
        "as_of",
        "hours",
        "state",
        "step",
        "steps",
        "data_age_seconds",
        "watched",
        "driver",
        "expected_end",
        "needs_you",
        "time_limits",
        "spares_held",
        "nodes_asked_for",
        "budgets",
        "lr_scale",
        "happened",
        "alerts_open",
        "suspects",
        "afterthoughts",
    ]
    assert set(fields["happened"][0]) == {"at", "author", "text", "quote", "drill", "anchor"}
