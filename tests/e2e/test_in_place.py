"""Recovery in place with everything real: daemon, agents, the trainer on four local nodes, two spares; and what may go
wrong while it runs. Each loss ends in one of two ways: the others keep their processes and no step is made twice, or
all ranks are restarted from a verified checkpoint. Never both."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from tests.e2e.site import QUICK_SILENCE, Site, until

pytest.importorskip("torch", reason="the trainer needs torch")

NODES, SPARES = 4, 2
TRAINER = f"'{sys.executable}', '-m', 'trainer'"
NAMES = [f"n{number}" for number in range(1, NODES + SPARES + 1)]
CONFIG = f"[local]\nnodes = {NAMES}\n[recovery]\nin_place_seconds = 40\n"
# So many losses so close together would be restarts.
PATIENCE = {
    "process_death": {"settle_steps = 50": "settle_steps = 2\n\n[budget.in_place]\nactions = 1000\nhours = 24"},
    "daemon_restart": {},
    **QUICK_SILENCE,
}
SETTINGS = ("steps=100000", "checkpoint_every=20", "data.seq_len=32", "data.global_batch=4", "model.num_layers=1")


class Day:
    """A lineage in training, with ranks to kill."""

    def __init__(self, site: Site) -> None:
        self.site = site
        site.command(
            *("run", "start", "opt-tiny", f"--nodes={NODES}", f"--spares={SPARES}", "-q"),
            *(f"--set={setting}" for setting in SETTINGS),
        )
        site.start_daemon()

    def ready(self, spares: int = SPARES) -> State:
        """Wait until everything is as before a loss, and so many spares have a warm rank."""

        def is_ready(state: State) -> State | None:
            attempt = state.attempt
            if attempt is None or state.status is not Status.TRAINING or state.open_incidents:
                return None
            warm = [name for name, node in state.nodes.items() if name not in attempt.nodes and node.standby]
            return state if len(warm) >= spares else None

        state: State = self.site.wait(is_ready)
        began = self.site.step()
        until(lambda: self.site.step() > began + 2)
        return state

    def kill(self, *ranks: int) -> None:
        processes = self.site.running_ranks()
        for rank in ranks:
            os.kill(processes[rank][0], signal.SIGKILL)

    def closed(self, kind: str = "process_death") -> Incident:
        """Wait until the newest incident of a kind is closed and nothing is open."""
        known = self.count(kind)

        def newest(state: State) -> Incident | None:
            found = [each for each in state.incidents.values() if each.kind == kind]
            return found[-1] if len(found) > known and not state.open_incidents else None

        incident: Incident = self.site.wait(newest)
        self.site.looked()
        return incident

    def count(self, kind: str) -> int:
        """How many incidents of a kind are closed."""
        return sum(each.kind == kind and each.closed_at is not None for each in self.site.state().incidents.values())

    def journaled(self, kind: type[e.Event], seq: int) -> bool:
        return any(isinstance(entry.event, kind) and entry.seq > seq for entry in self.site.entries())

    def judge(self) -> None:
        """No loss was answered twice, no step of an attempt was made twice, and no generation has two ends."""
        state = self.site.state()
        assert state.status is not Status.HALTED, state.why
        entries = [entry.event for entry in self.site.entries()]
        for attempt in state.attempts.values():
            folder = self.site.runs / "1" / attempt.name.replace("-", "/")
            text = (folder / "telemetry.jsonl").read_bytes().rpartition(b"\n")[0]
            steps = [json.loads(line)["num_updates"] for line in text.splitlines()]
            assert steps == list(range(steps[0], steps[0] + len(steps))), "a step is missing, or was made twice"
            joined = [x.generation for x in entries if isinstance(x, e.MembersJoined) and x.attempt == attempt.name]
            failed = [x.generation for x in entries if isinstance(x, e.MembersFailed) and x.attempt == attempt.name]
            assert len({*joined, *failed}) == len(joined) + len(failed)
        for incident in state.incidents.values():
            if incident.decision is not None and incident.decision.action is Action.REPLACE_RANKS:
                assert not any(other.incident == incident.name for other in state.attempts.values()), "both"
        assert all(each.proven is not False for each in state.incidents.values())


@pytest.fixture
def day(tmp_path: Path) -> Iterator[Day]:
    site = Site(tmp_path, CONFIG, trainer=TRAINER, **PATIENCE)
    day = Day(site)
    yield day
    site.close()


def in_place(incident: Incident) -> dict[str, Any]:
    assert incident.decision is not None
    assert incident.decision.action is Action.REPLACE_RANKS, (incident.decision.why, incident.fell_back)
    assert (incident.proven, incident.steps_lost) == (True, 0), incident.proof
    return dict(incident.proof)


def restarted(incident: Incident) -> None:
    assert incident.decision is not None
    assert incident.decision.action is Action.RESTART
    assert incident.proven, incident.proof


def kept(before: dict[int, tuple[int, str]], after: dict[int, tuple[int, str]], *lost: int) -> None:
    """All other ranks have the process that they had."""
    assert {rank: each for rank, each in before.items() if rank not in lost} == {
        rank: each for rank, each in after.items() if rank not in lost
    }
    assert all(after[rank][0] != before[rank][0] for rank in lost)


def test_ranks_are_replaced_and_the_daemon_may_die_with_them(day: Day):
    """The first rank too. The daemon dies at each moment of a recovery in turn; the next one goes on."""
    site = day.site
    day.ready()
    before = day.site.running_ranks()
    day.kill(0)
    assert in_place(day.closed())["pids_kept"]
    kept(before, day.site.running_ranks(), 0)

    for moment in (e.IncidentOpened, e.MembersIntended, e.MembersJoined):
        day.ready(spares=1)
        before, seq, closed = day.site.running_ranks(), site.entries()[-1].seq, day.count("process_death")
        day.kill(3)
        until(lambda moment=moment, seq=seq: day.journaled(moment, seq))
        site.kill_daemon()
        site.start_daemon()
        site.wait(lambda state, closed=closed: not state.open_incidents and day.count("process_death") > closed)
        incident = [each for each in site.state().incidents.values() if each.kind == "process_death"][-1]
        in_place(incident)
        kept(before, day.site.running_ranks(), 3)
    assert list(site.state().attempts) == ["1.00-a0"]
    day.judge()


@pytest.mark.soak
def test_a_second_rank_dies_while_the_first_is_replaced(day: Day):
    day.ready()
    before, seq = day.site.running_ranks(), day.site.entries()[-1].seq
    day.kill(0)
    until(lambda: day.journaled(e.MembersIntended, seq))
    day.kill(1)  # rank 2 keeps the copy of rank 0, rank 3 that of rank 1
    in_place(day.closed())
    kept(before, day.site.running_ranks(), 0, 1)
    day.judge()


@pytest.mark.soak
def test_a_rank_and_its_buddy_die(day: Day):
    day.ready()
    day.site.wait(lambda state: any(known.good for known in state.checkpoints.values()))
    day.kill(0, 2)
    restarted(day.closed())
    day.judge()


@pytest.mark.soak
def test_the_standbys_die_with_the_rank(day: Day):
    day.ready()
    waiting = [pid for pid in _children(day.site) if b"OPT_OPS_STANDBY=1" in _environment(pid)]
    assert len(waiting) >= SPARES
    day.kill(1)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
    day.closed()
    day.judge()


@pytest.mark.soak
def test_a_survivor_is_stuck(day: Day):
    """It is stopped, so it joins nothing: it is replaced as well."""
    day.ready()
    before = day.site.running_ranks()
    os.kill(before[1][0], signal.SIGSTOP)
    day.kill(0)
    in_place(day.closed())
    kept(before, day.site.running_ranks(), 0, 1)
    day.judge()


@pytest.mark.soak
def test_a_partition_in_which_both_halves_live_silent(day: Day):
    """The agent of the node of rank 0 is not heard, its rank lives on. It is replaced, and fenced."""
    day.ready()
    before = day.site.running_ranks()
    agent = day.site.agents()[before[0][1]]
    os.kill(agent, signal.SIGSTOP)
    incident = day.closed("silent_node")
    assert incident.proven
    os.kill(agent, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{before[0][0]}").exists() or _is_zombie(before[0][0]))
    time.sleep(1)
    day.judge()


def _children(site: Site) -> list[int]:
    agents = set(site.agents().values())
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _read(path).rpartition(b")")[2].split()
        if fields and int(fields[1]) in agents:
            found.append(int(path.parent.name))
    return found


def _environment(pid: int) -> bytes:
    return _read(Path(f"/proc/{pid}/environ"))


def _is_zombie(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()[:1] == [b"Z"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
