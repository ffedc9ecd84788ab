"""What was tried against each class of failure, and what worked: from journals."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicles.logbook.story.afterthoughts import afterthoughts
from chronicles.logbook.story.model import Strategy
from chronicles.logbook.story.strategies import FEWER_NODES, strategies
from chronicles.record import load
from chronicles.report.build import build
from opt_ops.core import events as e
from opt_ops.core.values import Action, Checkpoint, Outcome
from tests.chronicles.eventful import eventful
from tests.chronicles.logbook.test_afterthoughts import alert, begun, rolled_back, trained_to
from tests.chronicles.told import Told


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path / "12", steps=4000)


def rows(told: Told) -> dict[tuple[str, str], Strategy]:
    record = load(told.folder)
    report = build(record)
    found = strategies(record, report, afterthoughts(record, report))
    assert [row.tried for row in found] == sorted((row.tried for row in found), reverse=True), "the commonest first"
    for row in found:
        assert row.worked + row.failed + row.not_needed + row.open == row.tried == len(row.incidents), row
    return {(row.failure, row.strategy): row for row in found}


def restarted(told: Told, kind: str, point: Checkpoint, last: int, **more: object) -> str:
    """The newest attempt ends because of an incident, and another one begins and trains to `last`, 0: to no step."""
    attempt = told.state.attempt
    assert attempt is not None
    told.end(attempt.name, Outcome.FAILED, attempt.last_step)
    incident = told.incident(kind, f"{kind} somewhere", attempt.name, attempt.last_step, **more)
    told.decide(incident, Action.RESTART, exclude=more.get("nodes", ()))
    run, _, number = attempt.name.partition("-a")
    following = f"{run}-a{int(number) + 1}"
    told.launch(following, point, incident)
    if last:
        told.train(following, point.step + 1, last).close(incident)
    return incident


def test_a_restart_worked_when_training_passed_the_place(told: Told):
    point = begun(told)
    hang = restarted(told, "hang", point, 210)
    row = rows(told)["hang", "restarted on the same nodes"]
    assert (row.tried, row.worked, row.incidents, row.steps_lost) == (1, 1, (hang,), 100)
    assert row.text.startswith("1 of 1 worked. ")
    assert "100 steps discarded" in row.text
    assert row.median_seconds_down is not None


def test_a_hang_that_is_followed_by_launches_that_die(told: Told):
    point = begun(told)
    restarted(told, "hang", point, 0)
    restarted(told, "process_death", point, 0)
    told.end("12.00-a2", Outcome.FAILED, None)
    halted = told.incident("process_death", "rank 5 left", "12.00-a2", None)
    told.decide(halted, Action.HALT).see(e.LineageHalted(why="spent", incident=halted))
    told.see(e.ResumeRequested(request="r1", author="ann", reason="mended"), seconds=600)
    told.launch("12.00-a3", point, "12-i000").train("12.00-a3", 101, 1200)
    told.close("12-i000").close("12-i001")
    found = rows(told)
    hang = found["hang", "restarted on the same nodes"]
    assert (hang.tried, hang.failed) == (1, 1), "the attempt that proved it was not the first one"
    deaths = found["process_death", "restarted on the same nodes"]
    assert (deaths.tried, deaths.failed, deaths.incidents) == (2, 2, ("12-i001", "12-i002"))
    assert "0 of 2 worked; 2 failed, and a person was called once" in deaths.text
    people = found["process_death", "a person looked, and resumed"]
    assert (people.tried, people.worked) == (1, 1)


def test_the_same_failure_again_within_500_steps_is_no_cure(told: Told):
    point = begun(told)
    restarted(told, "hang", point, 400)
    restarted(told, "hang", told.save("12.00", 390), 1200)
    row = rows(told)["hang", "restarted on the same nodes"]
    assert (row.tried, row.worked, row.failed) == (2, 1, 1)


def test_hardware_fails_again_on_another_node_without_blame(told: Told):
    point = begun(told)
    restarted(told, "bad_gpu", point, 210, nodes=("n1",))
    restarted(told, "bad_gpu", told.save("12.00", 205), 300, nodes=("n2",))
    spare = told.incident("bad_gpu", "n3: gpu_lost", None, None, nodes=("n3",))
    told.decide(spare, Action.EXCLUDE, exclude=("n3",)).see(
        e.IncidentClosed(incident=spare, proven=True, proof={}, step_resumed=None, steps_lost=0, seconds_down=0.0)
    )
    found = rows(told)
    used = found["bad_gpu", "restarted on a spare node"]
    assert (used.tried, used.worked) == (2, 2)
    idle = found["bad_gpu", "excluded while no rank ran there, a replacement asked for"]
    assert idle.text == "1 of 1 worked. No stop, no step discarded."
    restarted(told, "bad_gpu", told.save("12.00", 290), 310, nodes=("n1",))
    assert rows(told)["bad_gpu", "restarted on a spare node"].failed == 1, "n1 failed before"


def test_rollbacks_and_waiting_for_a_jump(told: Told):
    rolled_back(told, begun(told), factor=0.75)
    trained_to(told, 162)
    alert(told, 161)
    trained_to(told, 300, lambda _: 2.0)
    alert(told, 299)
    found = rows(told)
    back = found["loss_spike", "rolled back to about 60 steps before it, learning rate × 0.75"]
    assert (back.tried, back.not_needed, back.incidents) == (1, 1, ("12-i000",))
    assert back.text.startswith("0 of 1 worked; 1 was not needed. ")
    waited = found["loss_spike", "waited for it to heal"]
    assert (waited.tried, waited.worked, waited.open) == (2, 1, 1)
    assert waited.text.startswith("1 of 2 healed; 1 cut short")


def test_drills_do_not_count(told: Told):
    restarted(told, "hang", begun(told), 210, drill="d001")
    assert rows(told) == {}


def test_everything_that_a_lineage_went_through(tmp_path: Path):
    found = rows(eventful(tmp_path / "12"))
    assert found["operator", "rolled back by a person, learning rate × 0.75, batches skipped"].tried == 1
    assert found["operator", "settings changed by a person, learning rate 6e-05, optim.clip_norm=0.5"].tried == 1
    assert found["out_of_memory", "a person looked, and resumed"].tried == 1
    (fewer,) = [row for (failure, _), row in found.items() if failure == FEWER_NODES]
    assert fewer.strategy.startswith("trained on 3 of 4 nodes for ")
    assert fewer.worked == 1
    assert " steps instead of none; " in fewer.text
