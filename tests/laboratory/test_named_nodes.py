"""A node that slows training down, or whose data is corrupt, is named and excluded."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.core.state.model import Incident
from opt_ops.core.values import Action, Tier
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.ports import SimulatedTrainer
from opt_ops.laboratory.simulated.training import Training
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)


def simulate(folder: Path, *plan: Planned, steps: int = 400, **other: object) -> SimulatedLineage:
    shape = start(nodes=3, spares=2, ranks_per_node=2)
    lineage = SimulatedLineage(folder, (Planned(fault=shape, at=0.0), *plan), physics(steps, gpus_per_node=2, **other))
    lineage.drive(until=100_000.0)
    assert lineage.state.status == "COMPLETED"
    return lineage


def nodes_of(lineage: SimulatedLineage, incident: Incident) -> tuple[str, ...]:
    assert incident.next_attempt is not None
    return lineage.state.attempts[incident.next_attempt].nodes


def test_a_flipped_bit_ends_in_a_rollback_to_before_all_agreed_without_its_node(tmp_path: Path):
    lineage = simulate(tmp_path, Planned(fault=faults.FlipBit(rank=3), step=250))
    (incident,) = lineage.state.incidents.values()
    used = lineage.state.attempts["1.00-a0"].nodes
    assert (incident.kind, incident.nodes, incident.step_failed, incident.onset_step) == (
        *("silent_data_corruption", (used[1],), 301, 201),
    )
    assert incident.cause.startswith(f"data is corrupt on rank 3 on {used[1]}: its own shards")
    decision = incident.decision
    assert decision is not None
    assert (decision.action, decision.lr_factor, decision.exclude) == (Action.ROLLBACK, None, (used[1],))
    assert decision.checkpoint is not None
    assert decision.checkpoint.step == 200, "those of steps 210 to 300 are verified, and in doubt"
    assert incident.proven
    assert used[1] not in nodes_of(lineage, incident)
    codes = {each.rank: each.code for each in lineage.state.attempts["1.00-a0"].exits}
    assert codes == {rank: 85 if rank == 3 else 87 for rank in range(6)}


def test_without_telemetry_the_exit_codes_name_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points = SimulatedTrainer.points

    def without_the_last_line(self: SimulatedTrainer, attempt: str):
        return [each for each in points(self, attempt) if each.checksums is None or not each.checksums.ranks]

    monkeypatch.setattr(SimulatedTrainer, "points", without_the_last_line)
    lineage = simulate(tmp_path, Planned(fault=faults.FlipBit(rank=3), step=250))
    (incident,) = lineage.state.incidents.values()
    used = lineage.state.attempts["1.00-a0"].nodes
    assert (incident.kind, incident.nodes) == ("silent_data_corruption", (used[1],))
    assert incident.decision is not None
    assert incident.decision.checkpoint is not None
    assert incident.decision.checkpoint.step == 200


def test_a_flip_as_a_drill_is_one_to_the_end(tmp_path: Path):
    drill = faults.Ask(request="r-flip", verb="drill", arguments={"fault": "flip-bit", "rank": 5})
    lineage = simulate(tmp_path, Planned(fault=drill, step=150))
    (incident,) = lineage.state.incidents.values()
    assert (incident.kind, incident.drill, incident.evidence["ranks"]) == ("silent_data_corruption", "d000", [5])
    assert incident.proven


def test_a_node_that_costs_a_fifth_is_named_and_left_out(tmp_path: Path):
    lineage = simulate(tmp_path, Planned(fault=faults.SlowDown(factor=1.28, seconds=1e6), step=150))
    (incident,) = lineage.state.incidents.values()
    (slow,) = (name for name, node in lineage.world.cluster.nodes.items() if node.slowness > 1.0)
    assert (incident.kind, incident.nodes) == ("throughput_drop", (slow,))
    assert f"{slow}, whose ranks were the slowest in 32 of 32 steps" in incident.cause
    decision = incident.decision
    assert decision is not None
    assert (decision.action, decision.save_first, decision.exclude) == (Action.RESTART, True, (slow,))
    assert slow not in nodes_of(lineage, incident)
    assert incident.steps_lost == 0, "it has saved before it left"


def test_a_drop_that_no_node_explains_is_told_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Training, "_busy", lambda self: None)
    lineage = simulate(tmp_path, Planned(fault=faults.SlowDown(factor=1.5, seconds=1e6), step=150))
    assert lineage.state.incidents == {}
    assert {(s.signal, s.tier) for s in lineage.state.signals.values()} == {("throughput_drop", Tier.ALERT)}


def test_a_loss_that_is_too_low_is_told_once_and_training_goes_on(tmp_path: Path):
    low = Planned(fault=faults.Bump(step=700, height=-1.0, steps=2000), at=0.0)
    lineage = simulate(tmp_path, low, steps=900)
    (incident,) = lineage.state.incidents.values()
    assert incident.decision is not None
    assert (incident.kind, incident.decision.action, incident.proven) == ("loss_too_low", Action.NOTIFY, None)
    assert len(lineage.state.attempts) == 1
    pages = [alert.told for alert in lineage.state.alerts.values() if alert.told.severity == "page"]
    assert [page.title for page in pages] == [f"opt-ops 1: {incident.cause}"]


def test_of_many_ranks_the_first_exits_are_journaled_and_how_all_ended(tmp_path: Path):
    plan = (Planned(fault=start(nodes=3, spares=0, ranks_per_node=40), at=0.0),)
    plan += (Planned(fault=faults.KillRank(rank=77), step=50),)
    lineage = SimulatedLineage(tmp_path, plan, physics(100, gpus_per_node=40))
    lineage.drive(until=100_000.0)
    first, second = lineage.state.attempts.values()
    assert len(first.exits) == 64
    assert (first.exits[0].rank, first.exits[0].signal) == (77, 9)
    assert first.ended == {"signal 9": 1, "code 1": 119}
    assert second.ended == {"code 0": 120}
