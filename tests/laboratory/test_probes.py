"""Probes that show nothing, in a simulated world whose agents run none: the ladder goes on, wherever a daemon dies."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.policy import ProbeRule
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory import simulated_lineage
from tests.laboratory.simulated_lineage import POLICY, Boundaries, SimulatedLineage, physics, start, without_sync

PLAN = (
    Planned(fault=start(nodes=1, spares=2), at=0.0),
    Planned(fault=faults.Diverge(divergence=Divergence(step=180, steps=2)), at=0.0),
)


def tell(folder: Path, boundaries: Boundaries) -> SimulatedLineage:
    costs = Costs(queue=10.0, startup=10.0, load=5.0)
    settings = physics(400, save_every=30, step_seconds=6.0, batch=8)
    lineage = SimulatedLineage(folder, PLAN, settings, costs, boundaries)
    lineage.drive(until=40_000.0, tick=10.0, settle=60.0)
    lineage.end()
    return lineage


def check(lineage: SimulatedLineage) -> None:
    state, counted = lineage.replayed(), Counter(type(entry.event) for entry in lineage.entries())
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert (counted[e.ProbesIntended], counted[e.ProbeEnded], counted[e.ProbesJudged]) == (1, 0, 1)
    (incident,) = [each for each in state.incidents.values() if each.probes]
    assert incident.decision.action is Action.ROLLBACK
    assert incident.proven
    assert not lineage.world.alive(), "ranks left behind"


def test_the_decision_comes_at_the_deadline_wherever_the_daemon_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    page = replace(POLICY.playbooks["loss_spike"], probe=ProbeRule(steps=30, deadline_seconds=450.0))
    policy = replace(POLICY, playbooks={**POLICY.playbooks, "loss_spike": page})
    monkeypatch.setattr(simulated_lineage, "POLICY", policy)
    counting = Boundaries()
    lineage = tell(tmp_path / "counted", counting)
    check(lineage)
    kinds = [e.kind_of(entry.event) for entry in lineage.entries()]
    appends = [number for number, what in enumerate(counting.passed) if what == "before append"]
    assert len(appends) == len(kinds)
    first, last = appends[kinds.index("probes_intended")], appends[kinds.index("probes_judged") + 2]
    assert last - first > 10
    for fatal in range(first, last, 2):
        check(tell(tmp_path / str(fatal), Boundaries(fatal)))
