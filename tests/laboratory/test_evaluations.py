"""Evaluations of checkpoints in a simulated world: each result once in the journal, whoever is killed when, and no
launch waits for one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.policy import EvaluationRule
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.status import Status
from opt_ops.core.values import EvaluationEnd
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory import simulated_lineage
from tests.laboratory.simulated_lineage import (
    POLICY,
    Boundaries,
    SimulatedLineage,
    answers,
    physics,
    start,
    without_sync,
)

STEPS, SAVE_EVERY = 330, 30
MILESTONES = set(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
COSTS = Costs(queue=10.0, startup=10.0, load=5.0, checkpoint_evaluation=60.0)
RULE = EvaluationRule(every=SAVE_EVERY, tasks=("sim",))
KILLS = (
    Planned(fault=faults.KillEvaluation(), step=37),
    Planned(fault=faults.KillRank(rank=1), step=70),
    Planned(fault=faults.BadGpu(), step=97),  # the spare is needed
    Planned(fault=faults.KillEvaluation(), step=157),
)


@pytest.fixture(autouse=True)
def evaluating(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sync(monkeypatch)
    monkeypatch.setattr(simulated_lineage, "POLICY", replace(POLICY, evaluation=RULE))


def tell(
    folder: Path,
    boundaries: Boundaries | None = None,
    plan: Sequence[Planned] = KILLS,
    tick: float = 5.0,
    seed: int = 1,
    steps: int = STEPS,
) -> SimulatedLineage:
    settings = physics(steps, save_every=SAVE_EVERY, step_seconds=6.0, seed=seed)
    plan = (Planned(fault=start(nodes=2, spares=1), at=0.0), *plan)
    lineage = SimulatedLineage(folder, plan, settings, COSTS, boundaries)
    lineage.drive(until=40_000.0, tick=tick, settle=1e9, unwatched=3.0)
    lineage.end()
    return lineage


def check(lineage: SimulatedLineage, steps: set[int]) -> None:
    state, world = lineage.replayed(), lineage.world
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert state.finished
    events = [entry.event for entry in lineage.entries()]
    keys = Counter(score_key(event) for event in events if isinstance(event, e.CheckpointEvaluated))
    assert set(keys.values()) <= {1}, "a result came twice"
    assert {event.step for event in events if isinstance(event, e.CheckpointEvaluated)} >= steps
    assert not [each for each in world.evaluations.all if each.runs], "an evaluation was left behind"
    assert all(each.end is not None for each in state.evaluations.values())
    done = Counter(each.intended.checkpoint for each in state.evaluations.values() if each.end is EvaluationEnd.DONE)
    assert set(done.values()) <= {1}
    assert set(answers(lineage.entries()).values()) == {1}
    assert not world.inbox


def test_every_milestone_is_evaluated_once_although_evaluations_and_their_nodes_are_lost(tmp_path: Path):
    lineage = tell(tmp_path)
    check(lineage, MILESTONES)
    ends = Counter(each.end for each in lineage.replayed().evaluations.values())
    assert ends[EvaluationEnd.FAILED] == 2
    assert ends[EvaluationEnd.GIVEN_UP] + ends[EvaluationEnd.LOST] >= 1


@pytest.mark.parametrize("beside", [False, True], ids=["on a spare", "beside the daemon"])
def test_each_result_is_there_once_wherever_the_daemon_dies(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(simulated_lineage, "POLICY", replace(POLICY, evaluation=replace(RULE, on_spares=not beside)))
    plan, last = (Planned(fault=faults.BadGpu(), step=97),), 140
    steps = {each for each in MILESTONES if each < last} | {last}
    counting = Boundaries()
    lineage = tell(tmp_path / "counted", counting, plan, steps=last)
    check(lineage, steps)
    kinds = [e.kind_of(entry.event) for entry in lineage.entries()]
    appends = [number for number, what in enumerate(counting.passed) if what == "before append"]
    told = ("evaluation_intended", "evaluation_ended", "checkpoint_evaluated")
    about = [at for at, kind in zip(appends, kinds, strict=True) if kind in told]
    wrong: list[str] = []
    for number in {at + later for later, at in enumerate(about[:4])} | {at + 3 - n for n, at in enumerate(about[-4:])}:
        try:
            check(tell(tmp_path / str(number), Boundaries(number), plan, steps=last), steps)
        except (AssertionError, ValueError) as error:
            wrong.append(f"killed at boundary {number}, {counting.passed[number]}: {error!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seed", range(4))
def test_each_result_is_there_once_whatever_is_killed_at_random(seed: int, tmp_path: Path):
    chance = random.Random(seed)
    kinds = (
        faults.KillEvaluation(),
        faults.KillRank(),
        faults.BadGpu(),
        faults.NodeDown(node=f"n00{chance.randrange(1, 4)}", seconds=600.0),
        faults.NodeCutOff(node=f"n00{chance.randrange(1, 4)}", seconds=300.0),
    )
    plan = [
        Planned(fault=faults.Later(fault=chance.choice(kinds), seconds=chance.uniform(0.0, 6.0)), step=step)
        for step in chance.sample(range(31, STEPS - 40), k=5)
    ]
    lineage = tell(tmp_path, Boundaries(chance.randrange(100, 900)), plan, seed=seed)
    check(lineage, set())
    evaluated = {each.step for each in lineage.replayed().scores.values()}
    assert evaluated
    assert evaluated <= MILESTONES


def test_a_launch_that_needs_the_spare_is_not_a_second_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = (Planned(fault=faults.Later(fault=faults.BadGpu(node="n001"), seconds=2.0), step=100),)

    def launched(folder: Path, rule: EvaluationRule) -> tuple[SimulatedLineage, float]:
        monkeypatch.setattr(simulated_lineage, "POLICY", replace(POLICY, evaluation=rule))
        lineage = tell(folder, plan=plan, tick=0.5)
        part = lineage.world.agents.parts["1.00-a1"]["n003"]
        return lineage, part.started_at

    _, without = launched(tmp_path / "without", EvaluationRule())
    lineage, at = launched(tmp_path / "with", RULE)
    gave_way = [each for each in lineage.replayed().evaluations.values() if each.end is EvaluationEnd.GIVEN_UP]
    assert [each.intended.node for each in gave_way] == ["n003"], "the spare was evaluating when it was needed"
    assert at - without <= 1.0


def test_a_failure_that_comes_again_is_told_and_not_tried_a_third_time(tmp_path: Path):
    lineage = tell(tmp_path, plan=(Planned(fault=faults.FailEvaluations(times=99), at=0.0),))
    state = lineage.replayed()
    failed = Counter(each.checkpoint for each in state.evaluations.values() if each.end is EvaluationEnd.FAILED)
    twice = [checkpoint for checkpoint, times in failed.items() if times == 2]
    assert twice
    assert max(failed.values()) == 2
    sent = [alert.id for _, alert in lineage.world.alerts if "/evaluation/" in alert.id]
    assert sorted(sent) == sorted(f"1/evaluation/{checkpoint}" for checkpoint in twice)
