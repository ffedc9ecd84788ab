"""The daemon is killed at boundaries of stories in which ranks are replaced in place, and the next one continues.

Recovered in place or restarted, never both. The boundaries are those of `test_kill_matrix.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.costs import InPlace
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import Boundaries, SimulatedLineage, physics, start, without_sync

PART = 20  # of the boundaries of one kind, each run tries one in so many
STEPS = 90


@dataclass(frozen=True)
class Story:
    """Faults, and the actions by which each incident is answered, in order."""

    name: str
    plan: tuple[Planned, ...]
    actions: tuple[tuple[Action, ...], ...]


SECOND_LOSS = faults.Later(fault=faults.KillRank(rank=2), seconds=6.0)
IN_PLACE = Story(
    name="in_place",
    plan=(
        Planned(fault=start(nodes=4, spares=2), at=0.0),
        Planned(fault=faults.KillRank(rank=1), step=30),
        Planned(fault=SECOND_LOSS, step=30),
        Planned(fault=faults.Hang(rank=3), step=60),
    ),
    actions=((Action.REPLACE_RANKS,), (Action.REPLACE_RANKS,)),
)
FALLS_BACK = Story(
    name="falls_back",
    plan=(
        Planned(fault=start(nodes=4, spares=2), at=0.0),
        Planned(fault=faults.FailReplacements(times=9), step=29),
        Planned(fault=faults.KillRank(rank=1), step=30),
    ),
    actions=((Action.REPLACE_RANKS, Action.RESTART),),
)
PAIR = Story(
    name="pair",
    plan=(
        Planned(fault=start(nodes=4, spares=2), at=0.0),
        Planned(fault=faults.KillRank(rank=1), step=30),
        Planned(fault=faults.Later(fault=faults.KillRank(rank=3), seconds=6.0), step=30),
    ),
    actions=((Action.REPLACE_RANKS, Action.RESTART),),
)
STORIES = (IN_PLACE, FALLS_BACK, PAIR)


def tell(story: Story, folder: Path, boundaries: Boundaries) -> SimulatedLineage:
    costs = Costs(queue=10.0, startup=10.0, load=5.0, in_place=InPlace(warm=20.0))
    settings = physics(STEPS, save_every=15, step_seconds=6.0)
    lineage = SimulatedLineage(folder, story.plan, settings, costs, boundaries)
    lineage.drive(until=20_000.0, tick=2.0, settle=60.0, unwatched=3.0)
    lineage.end()
    return lineage


def spread(boundaries: list[str]) -> list[int]:
    """A part of the boundaries: of each kind the first, the last, and some between."""
    kinds: dict[str, list[int]] = {}
    for number, kind in enumerate(boundaries):
        kinds.setdefault(kind, []).append(number)
    return sorted({number for its in kinds.values() for number in (*its[::PART], its[-1])})


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_it_ends_the_same_wherever_the_daemon_dies(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    counting = Boundaries()
    check(story, tell(story, tmp_path / "counted", counting))
    wrong: list[str] = []
    for number in spread(counting.passed):
        try:
            check(story, tell(story, tmp_path / str(number), Boundaries(number)), killed=True)
        except (AssertionError, ValueError) as error:
            wrong.append(f"killed at boundary {number}, {counting.passed[number]}: {error!r}")
    assert not wrong, "\n".join(wrong)


def check(story: Story, lineage: SimulatedLineage, killed: bool = False) -> None:
    state, entries, world = lineage.replayed(), lineage.entries(), lineage.world
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert not world.cluster.live, "jobs left behind"
    assert not world.alive(), "ranks left behind"
    faulty = [incident for incident in state.incidents.values() if incident.kind != "daemon_restart"]
    decided: dict[str, list[Action]] = {}
    for entry in entries:
        if isinstance(entry.event, e.RecoveryDecided):
            decided.setdefault(entry.event.incident, []).append(entry.event.action)
    assert tuple(tuple(decided[incident.name]) for incident in faulty) == story.actions or killed, decided
    for incident in faulty:
        assert incident.proven, f"{incident.name} {incident.kind} {incident.proof}"
        assert len(decided[incident.name]) <= 2, decided
    for attempt in state.attempts.values():
        never_both(attempt, [entry.event for entry in entries])
    assert len(state.attempts) == 1 + sum(Action.RESTART in actions for actions in decided.values())


def never_both(attempt: Attempt, events: Sequence[e.Event]) -> None:
    """What was joined was not given up, and what was given up is not joined afterwards."""
    told = [event for event in events if getattr(event, "attempt", None) == attempt.name]
    orders = Counter(event.generation for event in told if isinstance(event, e.MembersIntended))
    joined = [event.generation for event in told if isinstance(event, e.MembersJoined)]
    failed = [event.generation for event in told if isinstance(event, e.MembersFailed)]
    assert set(orders.values()) <= {1}, "a generation has one content"
    assert not set(joined) & set(failed)
    assert len(joined) == len(set(joined))
    assert len(failed) <= 1
    if failed:
        assert all(generation < failed[0] for generation in joined)
        assert attempt.stop_why is not None or not attempt.live
