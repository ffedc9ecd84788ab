"""The daemon is killed at every boundary of a story with several recoveries, and the next one continues.

A boundary lies before and after every journal entry, in the middle of its line, and before and after everything that
is done to the world. Wherever the daemon dies, the world must see the same story.

Each run tries a fifth of the boundaries of every kind, first and last ones included; `make soak` tries all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import Boundaries, SimulatedLineage, answers, physics, start, without_sync


@dataclass(frozen=True)
class Story:
    """Faults in a number of steps, and the expected incidents."""

    steps: int
    kinds: tuple[str, ...]
    plan: tuple[Planned, ...]


RECOVERIES = Story(
    steps=300,
    kinds=("process_death", "bad_gpu", "loss_spike", "silent_node"),
    plan=(
        Planned(fault=start(), at=0.0),
        Planned(fault=faults.Diverge(divergence=Divergence(step=180)), at=0.0),
        Planned(fault=faults.Ask(request="r-note", verb="note", arguments={"target": "1", "text": "hm"}), step=20),
        Planned(fault=faults.Ask(request="r-odd", verb="dance"), step=21),
        Planned(fault=faults.KillRank(rank=1), step=40),
        Planned(fault=faults.BadGpu(), step=70),
        Planned(fault=faults.NoNodes(seconds=9000.0), step=249),  # the silent node's replacement is given back unused
        Planned(fault=faults.NodeCutOff(seconds=900.0), step=250),
    ),
)
LOST = Story(
    steps=60,
    kinds=("allocation_lost",),
    plan=(Planned(fault=start(), at=0.0), Planned(fault=faults.EndJob(reason="NODE_FAIL"), step=30)),
)

PART = 5  # of the boundaries of one kind, each run tries one in so many
CHUNKS = 4


def tell(story: Story, folder: Path, boundaries: Boundaries) -> SimulatedLineage:
    costs = Costs(queue=10.0, startup=10.0, load=5.0)
    settings = physics(story.steps, save_every=30, step_seconds=6.0)
    lineage = SimulatedLineage(folder, story.plan, settings, costs, boundaries)
    lineage.drive(until=40_000.0, tick=10.0, settle=60.0)
    lineage.end()
    return lineage


def count(story: Story, folder: Path) -> list[str]:
    """Return the boundaries of the story without a kill."""
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        counting = Boundaries()
        lineage = tell(story, folder, counting)
    check(story, lineage)
    return counting.passed


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return count(RECOVERIES, tmp_path_factory.mktemp("counted"))


def test_the_story_has_boundaries_of_every_kind(boundaries: list[str]):
    effects = {"submit", "cancel", "order", "drain", "send", "done"}
    expected = {f"{when} {what}" for when in ("before", "after") for what in (*effects, "append")} | {"torn append"}
    assert set(boundaries) == expected


def spread(boundaries: list[str]) -> list[int]:
    """A part of the boundaries: of each kind the first, the last, and some between."""
    kinds: dict[str, list[int]] = {}
    for number, kind in enumerate(boundaries):
        kinds.setdefault(kind, []).append(number)
    return sorted({number for its in kinds.values() for number in (*its[::PART], its[-1])})


def test_it_ends_the_same_where_the_daemon_dies_at_boundaries_of_every_kind(
    boundaries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    kill_at_each(RECOVERIES, boundaries, spread(boundaries), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_it_ends_the_same_wherever_the_daemon_dies(
    boundaries: list[str], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    kill_at_each(RECOVERIES, boundaries, range(chunk, len(boundaries), CHUNKS), tmp_path)


def test_a_lost_allocation_is_called_one_where_the_daemon_dies_at_boundaries_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    boundaries = count(LOST, tmp_path / "counted")
    kill_at_each(LOST, boundaries, spread(boundaries), tmp_path)


def kill_at_each(story: Story, boundaries: list[str], fatal: Iterable[int], folder: Path) -> None:
    wrong: list[str] = []
    for number in fatal:
        try:
            check(story, tell(story, folder / str(number), Boundaries(number)))
        except (AssertionError, ValueError) as error:
            wrong.append(f"killed at boundary {number}, {boundaries[number]}: {error!r}")
    assert not wrong, "\n".join(wrong)


def check(story: Story, lineage: SimulatedLineage) -> None:
    state, entries, world = lineage.replayed(), lineage.entries(), lineage.world
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert state.finished
    assert not world.cluster.live, "jobs left behind"
    assert not world.alive(), "ranks left behind"

    intended = Counter(x.event.allocation for x in entries if isinstance(x.event, e.AllocationIntended))
    submitted = Counter(job.allocation for job in world.cluster.jobs.values())
    failed = {x.event.allocation for x in entries if isinstance(x.event, e.AllocationFailed)}
    assert set(intended.values()) == {1}
    assert submitted == Counter(intended.keys() - failed), f"{submitted}, intended {intended}, failed {failed}"
    assert max(lineage.most_live.values()) == 1
    assert set(world.agents.starts.values()) == {1}, "ranks were started twice"

    asked = {planned.fault.request for planned in story.plan if isinstance(planned.fault, faults.Ask)}
    assert answers(entries) == Counter(asked)
    assert not world.inbox

    kinds = tuple(incident.kind for incident in state.incidents.values() if incident.kind != "daemon_restart")
    assert kinds == story.kinds
    for incident in state.incidents.values():
        assert incident.proven, f"{incident.name} {incident.kind} {incident.proof}"

    sent = {alert.id for _, alert in world.alerts}
    told = {x.event.alert for x in entries if isinstance(x.event, e.AlertIntended)}
    assert told
    assert sent == told
