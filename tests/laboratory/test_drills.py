"""Everything that follows from a drill is marked as the drill, in whatever class it is seen, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.core.decide.drills import CAN_CAUSE
from opt_ops.core.values import Fault, Severity
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync

DRILLS = {
    Fault.LR: {"factor": 40.0, "updates": 20, "from_step": None},
    Fault.NAN: {"from_step": None},
    Fault.FLIP_BIT: {"rank": 1},
    Fault.KILL_RANK: {"rank": 1},
    Fault.HANG: {"rank": 0},
    Fault.XID: {"node": "n002", "xid": 79},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)


def lived(folder: Path, *plan: Planned, seconds: float = 5.0, steps: int = 400) -> SimulatedLineage:
    world = physics(steps, step_seconds=seconds, loss_start=2.2)
    lineage = SimulatedLineage(folder, [Planned(fault=start(), at=0.0), *plan], world)
    lineage.drive(until=200_000.0)
    assert lineage.state.status == "COMPLETED", lineage.state.why
    return lineage


def drill(fault: Fault, at: int) -> Planned:
    given = {"fault": str(fault), **DRILLS[fault]}
    return Planned(fault=faults.Ask(request=f"r-{fault}", verb="drill", arguments=given), step=at)


@pytest.mark.parametrize("seconds", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("at", [60, 201, 390])
@pytest.mark.parametrize("fault", list(DRILLS))
def test_what_follows_from_a_drill_is_the_drill_and_wakes_nobody(tmp_path: Path, fault: Fault, at: int, seconds: float):
    lineage = lived(tmp_path, drill(fault, at), seconds=seconds)
    incidents = list(lineage.state.incidents.values())
    assert {(incident.kind, incident.drill) for incident in incidents} <= {(kind, "d000") for kind in CAN_CAUSE[fault]}
    loud = [alert.title for _, alert in lineage.world.alerts if alert.severity is not Severity.INFO]
    assert loud == []
    if at < 390 or fault is not Fault.LR:
        assert incidents, "it was seen"


@pytest.mark.parametrize("fault", list(DRILLS))
def test_what_does_not_follow_from_a_drill_is_not_the_drill(tmp_path: Path, fault: Fault):
    """The same kinds of trouble, before the drill and long after it."""
    ill = faults.Diverge(divergence=Divergence(step=150, cured_below=0.8))
    lineage = lived(
        tmp_path,
        Planned(fault=ill, at=0.0),
        Planned(fault=faults.KillRank(rank=0), step=100),
        drill(fault, 300),
        Planned(fault=faults.KillRank(rank=0), step=630),
        steps=700,
    )
    marked = [i for i in lineage.state.incidents.values() if i.drill is not None]
    real = [i for i in lineage.state.incidents.values() if i.drill is None]
    assert {incident.kind for incident in marked} <= CAN_CAUSE[fault]
    assert [incident.kind for incident in real] == ["process_death", "loss_spike", "process_death"]
