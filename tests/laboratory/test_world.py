"""The simulated world behaves as the ports say, and the same seed gives the same history."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import Action, AllocationStatus, LrFactor, Schedule
from opt_ops.errors import Refused, SchedulerUnavailable
from opt_ops.laboratory.simulated import Physics, World, faults
from opt_ops.laboratory.simulated.costs import Costs
from opt_ops.laboratory.simulated.ports import (
    SimulatedAgents,
    SimulatedCheckpoints,
    SimulatedScheduler,
    SimulatedTrainer,
)
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import EPOCH, Planned
from opt_ops.ports import Launch, Orders
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)


class Bench:
    """A world without a supervisor: two of four nodes are held, and the test writes the orders."""

    def __init__(self, **other: object) -> None:
        self.world = World(Physics(**{"nodes": 4, "gpus_per_node": 1, "steps": 100, "save_every": 10, **other}))
        self.scheduler = SimulatedScheduler(self.world)
        self.agents = SimulatedAgents(self.world)
        self.trainer = SimulatedTrainer(self.world)
        self.store = SimulatedCheckpoints(self.world)
        self.seq = 0
        self.job = self.scheduler.submit("1-n0", 2, ())
        self.world.advance(60.0)

    def order(self, attempt: str | None, *options: str, epoch: int = 1, **other: object) -> None:
        self.seq += 1
        argv = ("train", "--checkpoint-dir", f"/c/{(attempt or '').partition('-')[0]}", *options)
        launch = Launch(
            attempt=attempt or "",
            nodes=("n001", "n002"),
            holders={"n001": "1-n0", "n002": "1-n0"},
            ranks_per_node=2,
            address="",
            port=1,
            argv=argv,
        )
        fields = {"drills": (), "released": (), **other}
        self.agents.order(Orders(epoch=epoch, seq=self.seq, launch=launch if attempt else None, **fields))

    def wait(self, seconds: float) -> None:
        self.world.advance(self.world.now + seconds)


def simulate(folder: Path, *plan: Planned, seed: int = 1, steps: int = 200, tick: float = 5.0) -> SimulatedLineage:
    lineage = SimulatedLineage(folder, (Planned(fault=start(), at=0.0), *plan), physics(steps, seed=seed))
    lineage.drive(until=100_000.0, tick=tick)
    assert lineage.state.finished
    return lineage


def journal(lineage: SimulatedLineage) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((lineage.folder / "journal").glob("*.jsonl")))


def test_one_seed_tells_one_story(tmp_path: Path):
    plan = (Planned(fault=faults.KillRank(), step=50), Planned(fault=faults.BadGpu(), step=90))
    once, again = simulate(tmp_path / "1", *plan), simulate(tmp_path / "2", *plan)
    assert journal(once) == journal(again)
    assert journal(simulate(tmp_path / "3", *plan, seed=2)) != journal(once)


def test_strides_over_quiet_time_cost_no_detection(tmp_path: Path):
    lineage = simulate(
        tmp_path, Planned(fault=faults.KillRank(), step=100), Planned(fault=faults.NodeCutOff(), step=150)
    )
    death, silence = lineage.state.incidents.values()
    assert death.opened_at - death.at <= 10.0
    assert silence.opened_at - silence.at <= 60.0
    ticks = lineage.boundaries.passed.count("before append")
    assert ticks < lineage.world.now / 5.0 / 4


def test_telemetry_is_a_function_of_seed_and_step():
    def losses(fault: bool) -> dict[int, float | None]:
        bench = Bench()
        bench.order("1.00-a0", "--from-scratch")
        bench.wait(600.0)
        if fault:
            bench.world.strike(faults.KillRank(rank=0))
            bench.wait(10.0)
            bench.order("1.00-a1", "--resume", "/c/1.00/step-00000020")
            bench.wait(600.0)
        found: dict[int, float | None] = {}
        for attempt in ("1.00-a0", "1.00-a1"):
            found |= {point.step: point.loss for point in bench.trainer.points(attempt)}
        return found

    straight, broken = losses(fault=False), losses(fault=True)
    assert len(broken) > len(straight)
    assert all(broken[step] == loss for step, loss in straight.items())


def test_the_learning_rate_is_the_one_of_the_formats():
    schedule = Schedule(peak_lr=3e-4, warmup_steps=7, total_steps=60, final_fraction=0.2)
    bench = Bench(schedule=schedule)
    bench.order("1.00-a0", "--from-scratch", "--lr-factor", "20:0.5", "--lr-factor", "30:0.75")
    bench.wait(5000.0)
    factors = (LrFactor(step=20, factor=0.5), LrFactor(step=30, factor=0.75))
    points = bench.trainer.points("1.00-a0")
    assert len(points) == 100
    assert [point.lr for point in points] == pytest.approx([expected_lr(schedule, factors, p.step) for p in points])


def test_an_attempt_is_started_once_however_often_it_is_ordered():
    bench = Bench()
    for _ in range(3):
        bench.order("1.00-a0", "--from-scratch")
        bench.wait(20.0)
    assert bench.world.agents.starts == {("1.00-a0", "n001"): 1, ("1.00-a0", "n002"): 1}
    bench.world.strike(faults.KillRank(rank=3))
    bench.wait(10.0)
    bench.order("1.00-a0", "--from-scratch")
    bench.wait(60.0)
    assert set(bench.world.agents.starts.values()) == {1}
    reports = bench.agents.reports("1.00-a0")
    assert [(x.rank, x.signal, x.code) for x in reports["n002"].exits] == [(3, 9, None), (2, None, 1)]


def test_an_older_daemon_process_is_not_obeyed():
    bench = Bench()
    bench.order("1.00-a0", "--from-scratch", epoch=2)
    bench.wait(20.0)
    bench.order(None, epoch=1)
    bench.wait(20.0)
    assert bench.world.alive() == {"1.00-a0": {"n001", "n002"}}
    bench.order(None, epoch=2)
    bench.wait(20.0)
    assert bench.world.alive() == {}


def test_a_cut_off_node_keeps_its_ranks_until_it_hears_again():
    bench = Bench()
    bench.order("1.00-a0", "--from-scratch")
    bench.wait(100.0)
    bench.agents.heartbeats()
    bench.world.strike(faults.NodeCutOff(node="n002", seconds=300.0))
    bench.order(None)
    bench.wait(30.0)
    assert bench.world.alive() == {"1.00-a0": {"n002"}}
    assert {heartbeat.node for heartbeat in bench.agents.heartbeats()} == {"n001"}
    assert not bench.agents.reports("1.00-a0")["n002"].done
    bench.wait(300.0)
    assert bench.world.alive() == {}
    assert bench.agents.reports("1.00-a0")["n002"].done


def test_ranks_die_with_their_agent_and_nobody_reports_it():
    bench = Bench()
    bench.order("1.00-a0", "--from-scratch")
    bench.wait(100.0)
    bench.world.strike(faults.NodeDown(node="n002", seconds=None))
    bench.wait(10.0)
    assert bench.world.alive() == {"1.00-a0": {"n001"}}
    assert bench.agents.reports("1.00-a0")["n002"].exits == ()
    assert bench.scheduler.state(bench.job).unfit == {}
    bench.wait(300.0)
    assert bench.scheduler.state(bench.job).unfit == {"n002": "down: not responding"}


def test_a_submission_without_an_answer_may_have_been_taken():
    bench = Bench()
    for accepted in (True, False):
        bench.world.strike(faults.LostAnswer(accepted=accepted))
        with pytest.raises(SchedulerUnavailable):
            bench.scheduler.submit(f"1-{accepted}", 1, ())
    assert [name for _, name in bench.scheduler.jobs()] == ["1-n0", "1-True"]
    with pytest.raises(Refused, match="4 nodes wanted, 3 exist"):
        bench.scheduler.submit("1-n9", 4, ("n001",))
    bench.world.strike(faults.SchedulerAway(seconds=10.0))
    with pytest.raises(SchedulerUnavailable):
        bench.scheduler.jobs()


def test_jobs_end_at_their_time_limit_after_a_warning():
    bench = Bench(time_limit=1000.0)
    state = bench.scheduler.state(bench.job)
    assert state.ends_at == EPOCH + 30.0 + 1000.0
    bench.wait(30.0 + 1000.0 - 60.0 - 60.0)
    assert all(heartbeat.warned for heartbeat in bench.agents.heartbeats())
    bench.wait(60.0)
    assert bench.scheduler.state(bench.job).status is AllocationStatus.ENDED
    assert bench.scheduler.state(bench.job).reason == "TIMEOUT"


def test_a_checkpoint_whose_writers_die_is_torn_and_a_damaged_one_is_refused():
    bench = Bench()
    bench.order("1.00-a0", "--from-scratch")
    bench.world.plan(Planned(fault=faults.Damage(), step=15))
    bench.world.plan(Planned(fault=faults.KillRank(rank=0), step=30))
    bench.wait(1000.0)
    assert [saved.step for saved in bench.store.committed("1.00")] == [10, 20]  # and not 30
    later = SimulatedCheckpoints(bench.world)  # another daemon process, which begins to read only now
    for checkpoint in bench.store.committed("1.00"):
        bench.store.examine(checkpoint)
        later.examine(checkpoint)
    assert [bool(problem) for _, problem in bench.store.examined()] == [False, True]
    assert later.examined() == []
    bench.wait(5.0)
    assert [bool(problem) for _, problem in later.examined()] == [False, True]
    bench.order("1.00-a1", "--resume", "/c/1.00/step-00000020")
    bench.wait(100.0)
    assert {x.code for report in bench.agents.reports("1.00-a1").values() for x in report.exits} == {65}


@pytest.mark.parametrize(("cured_below", "rollbacks"), [(0.8, 1), (0.6, 2)])
def test_a_divergence_is_cured_by_a_low_enough_learning_rate(tmp_path: Path, cured_below: float, rollbacks: int):
    divergence = Divergence(step=450, cured_below=cured_below)
    lineage = simulate(tmp_path, Planned(fault=faults.Diverge(divergence=divergence), at=0.0), steps=600)
    actions = [i.decision.action for i in lineage.state.incidents.values() if i.decision]
    assert actions == [Action.ROLLBACK] * rollbacks
    assert lineage.state.status == "COMPLETED"


def test_a_bump_heals_by_itself(tmp_path: Path):
    lineage = simulate(tmp_path, Planned(fault=faults.Bump(step=260, steps=20), at=0.0), steps=320)
    assert {signal.tier for signal in lineage.state.signals.values()} == {"alert"}
    assert lineage.state.incidents == {}


def test_a_job_that_takes_its_time_to_end_is_not_cancelled_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    cancel = SimulatedScheduler.cancel

    def counted(self: SimulatedScheduler, job: str) -> None:
        asked.append(job)
        cancel(self, job)

    monkeypatch.setattr(SimulatedScheduler, "cancel", counted)
    plan = [
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.NoNodes(seconds=1e6), at=0.0),
        Planned(fault=faults.Ask(request="r-stop", verb="stop", arguments={"reason": "enough"}), at=60.0),
    ]
    lineage = SimulatedLineage(tmp_path, plan, physics(100), Costs(cancel=100.0))
    lineage.drive(until=400.0, tick=1.0)
    assert lineage.state.finished
    assert len(asked) == 4, "once, and every half minute until it was gone"
