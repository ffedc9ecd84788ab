"""Runs under other schedules than linear, in a simulated world: a rank dies, the daemon dies, the loss diverges."""

from dataclasses import replace
from pathlib import Path

import pytest

from opt_ops.core.values import Schedule
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import Boundaries, SimulatedLineage, physics, start, without_sync

FALL = Schedule(peak_lr=1e-4, warmup_steps=10, total_steps=400, delay=1)
KINDS = {
    "cosine": replace(FALL, kind="cosine"),
    "polynomial": replace(FALL, kind="polynomial", power=2.0, final_fraction=0.1),
    "constant": Schedule(kind="constant", peak_lr=1e-4, warmup_steps=10),
    "wsd": replace(FALL, kind="wsd", decay_steps=300, decay="sqrt", warmup_from=0.1),
    "table": Schedule(kind="table", knots=((1.0, 1e-5), (10.0, 1e-4), (400.0, 1e-6))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives_every_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    without_sync(monkeypatch)
    plan = [
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.KillRank(rank=0), step=5),
        Planned(fault=faults.Diverge(divergence=Divergence(step=250)), at=0.0),
    ]
    world = physics(400, loss_start=2.2, schedule=KINDS[kind])
    lineage = SimulatedLineage(tmp_path, plan, world, boundaries=Boundaries(fatal=200))
    state = lineage.drive(until=200_000.0)
    assert state.status == "COMPLETED", state.why
    assert len({entry.epoch for entry in lineage.entries()}) > 1, "a second daemon process took over"
    incidents = list(state.incidents.values())
    assert {"process_death", "loss_spike"} <= {incident.kind for incident in incidents}
    assert all(incident.proven for incident in incidents), [incident.proof for incident in incidents]
    assert [factor.factor for factor in state.run.lr_factors] == [0.75]
    assert all(each.proof["schedule_proven"] for each in incidents if each.kind in ("process_death", "loss_spike"))
    assert not any(raised.signal == "unplanned_lr" for raised in state.signals.values())
