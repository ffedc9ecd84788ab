"""Regression tests: the smallest stories in which the supervisor once did the wrong thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.core.values import Severity
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)


def test_a_divergence_is_answered_although_allocations_keep_ending(tmp_path: Path):
    plan = (
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.Diverge(divergence=Divergence(step=120)), at=0.0),
    )
    lineage = SimulatedLineage(tmp_path, plan, physics(200, time_limit=1500.0))
    state = lineage.drive(until=86400.0, tick=20.0)
    assert "loss_spike" in {incident.kind for incident in state.incidents.values()}


def test_people_hear_of_a_lineage_that_waits_for_nodes_that_never_come(tmp_path: Path):
    plan = (
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.NoNodes(seconds=1e6), at=600.0),
        Planned(fault=faults.NodeDown(seconds=None), at=700.0),
        Planned(fault=faults.NodeDown(seconds=None), at=1500.0),
    )
    lineage = SimulatedLineage(tmp_path, plan, physics(200))
    state = lineage.drive(until=12 * 3600.0, tick=20.0)
    assert state.attempt is not None
    assert not state.attempt.live
    pages = [alert.title for _, alert in lineage.world.alerts if alert.severity is Severity.PAGE]
    assert pages == ["opt-ops 1: RECOVERING, waiting for nodes"]


def test_two_requests_of_one_moment_are_two(tmp_path: Path):
    drill = {"fault": "xid", "xid": 31}
    plan = (
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.Ask(request="r-1", verb="drill", arguments={**drill, "node": "n001"}), step=20),
        Planned(fault=faults.Ask(request="r-2", verb="drill", arguments={**drill, "node": "n002"}), step=20),
    )
    lineage = SimulatedLineage(tmp_path, plan, physics(60))
    assert len(lineage.drive(until=20_000.0).drills) == 2


def test_an_attempt_ends_although_its_node_is_back_through_another_allocation(tmp_path: Path):
    plan = (
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.NodeDown(node="n002", seconds=20.0), step=30),
    )
    # The node is back just when the attempt is being stopped: it is held, sends heartbeats, and has nothing to start.
    lineage = SimulatedLineage(tmp_path, plan, physics(60, nodes=3), Costs(queue=75.0))
    assert lineage.drive(until=20_000.0, tick=10.0).finished


@pytest.mark.parametrize(
    "jumps",
    [
        ((-5.0, 5.0), (-5.0, 300.0), (3600.0, 0.0), (3600.0, 0.0)),
        ((-5.0, 5.0), (3600.0, 5.0), (3600.0, 0.0), (3600.0, 5.0), (-3600.0, 5.0)),
        ((4960.0, 300.0),),
        ((365 * 86400.0, 30.0), (-365 * 86400.0, 30.0)),
    ],
)
def test_a_clock_that_is_wrong_by_more_than_the_time_limit_holds_no_lineage_in_the_queue(
    tmp_path: Path, jumps: tuple[tuple[float, float], ...]
):
    """The end of an allocation is a time of the scheduler's clock: by the daemon's, each new one was over already."""
    lineage = SimulatedLineage(tmp_path, [Planned(fault=start(), at=0.0)], physics(200, time_limit=5000.0))
    lineage.drive(700.0)
    for seconds, then in jumps:
        lineage.world.strike(faults.ClockJump(seconds=seconds))
        lineage.world.strike(faults.EndJob())
        lineage.drive(lineage.world.now + then)
    state = lineage.drive(lineage.world.now + 86400.0, tick=20.0)
    assert (state.status, state.finished) == ("COMPLETED", True)
    assert len(state.allocations) < 60


@pytest.mark.parametrize("deaths", [(300,), (299,), (268,), (299, 298, 297)], ids=str)
def test_a_spike_that_heals_is_given_the_same_time_after_a_restart_that_has_nothing_to_do_with_it(
    tmp_path: Path, deaths: tuple[int, ...]
):
    plan = [
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.Bump(step=260, steps=20), at=0.0),
        *(Planned(fault=faults.KillRank(), step=step) for step in deaths),
    ]
    lineage = SimulatedLineage(tmp_path, plan, physics(420, step_seconds=5.0, save_every=100))
    state = lineage.drive(until=86400.0)
    assert state.status == "COMPLETED"
    assert {incident.kind for incident in state.incidents.values()} == {"process_death"}
    spikes = [raised for raised in state.signals.values() if raised.signal == "loss_spike"]
    assert len(spikes) == 1 + len(deaths), "it was seen each time"
