"""The daemon is stopped at every boundary of a story with five recoveries, and the next one goes on.

A boundary lies before and after every journal entry, in the middle of its line, and before and after everything that
is done to the world. Wherever the daemon dies, the world must see the same story.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from opt_ops.adapters.simulated import faults
from opt_ops.adapters.simulated.training import Sickness
from opt_ops.adapters.simulated.world import Planned
from opt_ops.core import events as e
from opt_ops.core.run import Status
from tests.simulated.lives import Boundaries, Lives, physics, start, without_sync

STEPS = 330
PLAN = (
    Planned(fault=start(), at=0.0),
    Planned(fault=faults.Diverge(sickness=Sickness(step=180)), at=0.0),
    Planned(fault=faults.Ask(request="r-note", verb="note", arguments={"target": "1", "text": "hm"}), step=20),
    Planned(fault=faults.Ask(request="r-odd", verb="dance", arguments={}), step=21),
    Planned(fault=faults.KillRank(rank=1), step=40),
    Planned(fault=faults.BadGpu(), step=70),
    Planned(fault=faults.Silence(seconds=900.0), step=250),
    Planned(fault=faults.NoNodes(seconds=9000.0), step=289),
    Planned(fault=faults.EndJob(reason="NODE_FAIL"), step=290),
)
KINDS = ["process_death", "bad_gpu", "loss_spike", "silent_node", "allocation_lost"]

CHUNKS = 6


def tell(folder: Path, boundaries: Boundaries) -> Lives:
    lives = Lives(folder, PLAN, physics(STEPS, save_every=30, step_seconds=6.0), boundaries=boundaries)
    lives.drive(until=40_000.0, tick=10.0)
    lives.end()
    return lives


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        counting = Boundaries()
        lives = tell(tmp_path_factory.mktemp("counted"), counting)
    state = lives.replayed()
    assert state.status is Status.COMPLETED
    assert [incident.kind for incident in state.incidents.values()] == KINDS
    return counting.passed


def test_the_story_has_boundaries_of_every_kind(boundaries: list[str]):
    effects = {"submit", "cancel", "order", "drain", "send", "done"}
    expected = {f"{when} {what}" for when in ("before", "after") for what in (*effects, "append")} | {"torn append"}
    assert set(boundaries) == expected


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_it_ends_the_same_wherever_the_daemon_dies(
    boundaries: list[str], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    wrong: list[str] = []
    for fatal in range(chunk, len(boundaries), CHUNKS):
        try:
            check(tell(tmp_path / str(fatal), Boundaries(fatal)))
        except (AssertionError, ValueError) as error:
            wrong.append(f"killed at boundary {fatal}, {boundaries[fatal]}: {error!r}")
    assert not wrong, "\n".join(wrong)


def check(lives: Lives) -> None:
    state, entries, world = lives.replayed(), lives.entries(), lives.world
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert state.settled
    assert not world.cluster.live, "jobs left behind"
    assert not world.alive(), "ranks left behind"

    intended = [x.event.allocation for x in entries if isinstance(x.event, e.AllocationIntended)]
    submitted = Counter(job.allocation for job in world.cluster.jobs.values())
    failed = {x.event.allocation for x in entries if isinstance(x.event, e.AllocationFailed)}
    assert len(intended) == len(set(intended))
    assert submitted == Counter(set(intended) - failed), f"{submitted}, intended {intended}, failed {failed}"
    assert max(lives.most_live.values()) == 1
    assert set(world.agents.starts.values()) == {1}, "started twice"

    answers = Counter(request for x in entries if (request := getattr(x.event, "request", None)) is not None)
    assert answers == {"r-start": 1, "r-note": 1, "r-odd": 1}
    assert not world.inbox

    kinds = [incident.kind for incident in state.incidents.values() if incident.kind != "daemon_restart"]
    assert kinds == KINDS, kinds
    for incident in state.incidents.values():
        assert incident.proven, f"{incident.name} {incident.kind} {incident.proof}"

    sent = {alert.id for _, alert in world.alerts}
    assert sent >= {x.event.alert for x in entries if isinstance(x.event, e.AlertIntended)}
