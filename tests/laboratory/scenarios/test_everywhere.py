"""The same failures are detected, decided and proven alike on all three schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Outcome
from tests.e2e.site import QUICK_HANG, Site
from tests.laboratory.scenarios import stages
from tests.laboratory.scenarios.stages import Stage, trains_on
from tests.slurm.conftest import quiet, slurm

__all__ = ["slurm"]  # a fixture

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster


@pytest.fixture(
    params=["simulated", pytest.param("local", marks=pytest.mark.soak), pytest.param("slurm", marks=pytest.mark.slurm)]
)
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    if request.param == "simulated":
        simulated = stages.Simulated(tmp_path, monkeypatch)
        yield simulated
        simulated.close()
        return
    if request.param == "local":
        site = Site(tmp_path, "[local]\nnodes = ['n1', 'n2', 'n3', 'n4']", **QUICK_HANG)
        yield stages.local(site)
        site.close()
        return
    cluster: Cluster = request.getfixturevalue("slurm")
    site = Site(tmp_path, 'scheduler = "slurm"\n[slurm]\npartition = "main"\ntime_minutes = 30', **QUICK_HANG)
    yield stages.slurm(site)
    site.close()
    quiet(cluster)


def proven(state: State, number: int) -> Incident | None:
    """Return the incident with that number, once it is proven and training continues."""
    incident = list(state.incidents.values())[number : number + 1]
    return incident[0] if incident and incident[0].proven and trains_on(state) else None


def test_a_day_of_failures_is_the_same_everywhere(stage: Stage):
    stage.wait(trains_on)
    state: State = stage.wait(lambda state: state)
    used = state.attempt.nodes

    stage.ask("drill", fault="kill-rank", rank=1)
    death = stage.wait(lambda state: proven(state, 0))
    assert (death.kind, death.decision.action, death.nodes) == ("process_death", Action.RESTART, (used[1],))

    stage.ask("drill", fault="hang", rank=0)
    hang = stage.wait(lambda state: proven(state, 1))
    assert (hang.kind, hang.decision.action, hang.stacks.silent) == ("hang", Action.RESTART, (0,))
    assert hang.nodes == (used[0],), "it is named, and not excluded at the first time"

    stage.ask("drill", fault="xid", node=used[1], xid=79)
    bad = stage.wait(lambda state: proven(state, 2))
    assert (bad.kind, bad.decision.action, bad.decision.exclude) == ("bad_gpu", Action.RESTART, (used[1],))
    state = stage.wait(lambda state: state)
    assert used[1] not in state.attempt.nodes
    assert len(state.attempt.nodes) == 2

    stage.lose_job()
    lost = stage.wait(lambda state: proven(state, 3))
    assert lost.kind in ("job_cancelled", "allocation_lost")
    assert lost.decision.action is Action.RESTART
    state = stage.wait(lambda state: state)
    assert used[1] not in state.attempt.nodes

    stage.ask("pause", reason="tea", keep_nodes=True)
    state = stage.wait(lambda state: state.status is Status.PAUSED and state)
    assert state.attempt.outcome is Outcome.STOPPED
    stage.ask("resume", reason="after tea")
    stage.wait(trains_on)
    stage.ask("change", reason="quieter", lr_factor=0.5)
    change = stage.wait(lambda state: proven(state, 4))
    assert (change.kind, change.decision.action) == ("operator", Action.RECONFIGURE)

    stage.ask("stop", reason="enough")
    state = stage.wait(lambda state: state.finished and state)
    assert state.status is Status.CANCELLED
    assert len(state.incidents) == 5, "and nothing else"
