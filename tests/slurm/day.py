"""A day of failures in one lineage on the real Slurm: each is put in when the one before is proven."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.events import Entry
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import Allocation, Incident, Node, State, Status
from opt_ops.core.values import Verdict
from opt_ops.core.waiting import SKEW_SECONDS
from tests.e2e.site import PATIENCE, Site, until

SETTLED = 55  # steps beyond a failure, after which the shipped ladders begin again (settle_steps = 50)

CONFIG = 'scheduler = "slurm"\n[slurm]\npartition = "main"\ntime_minutes = 30'


def ask(*command: str) -> str:
    """A Slurm command's answer."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def with_state_before(entries: Iterable[Entry]) -> Iterator[tuple[Entry, State]]:
    """Each entry of a journal, and the state that its event was decided on."""
    state = State()
    for entry in entries:
        yield entry, state
        state = fold(state, entry)


def is_fit(node: Node | None) -> bool:
    """Whether a node of the tests' Slurm, which has no GPUs, has said so, and has not been silent since."""
    if node is None or node.excluded_by is not None or node.verdict is not Verdict.UNKNOWN:
        return False
    return node.reason.startswith("nvml_")


def staying(state: State, now: float) -> dict[str, Allocation]:
    """The held nodes whose time limit is not near: an hour before, or in the last quarter of a short job."""

    def near(held: Allocation) -> bool:
        end = held.ends_at  # a job that goes on a minute after its end has none that is known
        return end is not None and end - min(3600.0, (end - held.since) / 4) < now <= end + SKEW_SECONDS

    return {name: held for name, held in state.held.items() if not near(held)}


def requests_were_needed(entries: Iterable[Entry]) -> None:
    """Nodes were asked for only while they were missing, and given back only when they were of no use.

    How often is not judged: on a busy machine a node may be silent for a while. Then another is asked for, and one of
    both is given back.
    """
    for entry, state in with_state_before(entries):
        event = entry.event
        if isinstance(event, e.AllocationIntended):
            wanted = state.shape.nodes + state.shape.spares
            fit = [name for name in staying(state, entry.ts) if is_fit(state.nodes.get(name))]
            pending = sum(each.wanted for each in state.live_allocations if each.pending)
            assert len(fit) + pending + event.nodes <= wanted, f"{event}, with {fit} and {pending} that were asked for"
        elif isinstance(event, e.ReleaseIntended) and not (state.ended or state.paused):
            given = state.allocations[event.allocation]
            own = {name for name, held in state.held.items() if held.name == given.name}
            in_use = state.attempt.nodes if state.attempt and state.attempt.live else ()
            assert own.isdisjoint(in_use), f"{event}: training uses its nodes"
            fit = [name for name in own if is_fit(state.nodes.get(name))]
            others = staying(state, entry.ts - 10).keys() - own  # it was decided a little before it was written
            enough = len(others) >= state.shape.nodes + state.shape.spares
            assert given.pending or not fit or enough, f"{event}, with {fit} on it"


class Day:
    """One lineage of the stub trainer, started and in training."""

    def __init__(self, site: Site, *settings: str, path: str = "", first: str = "", **shape: int) -> None:
        self.site = site
        self.expected: list[str] = []
        site.start("steps=10000", *settings, **shape)
        site.start_daemon(first, **({"PATH": path} if path else {}))
        self.trained(40)

    @property
    def state(self) -> State:
        """The lineage's."""
        return self.site.state()

    @property
    def attempt(self) -> str:
        """The newest one's name."""
        attempt = self.state.attempt
        return attempt.name if attempt else ""

    def trained(self, steps: int) -> int:
        """Wait for as many more steps of the newest attempt; the step then."""
        self.site.wait(lambda state: state.status is Status.TRAINING)
        began = self.site.step()
        return until(lambda: (step := self.site.step()) >= began + steps and step)

    def settled(self) -> None:
        """Train on until the newest failure is so far behind that another one like it is answered as the first."""
        failed = max((incident.step_failed or 0 for incident in self.state.incidents.values()), default=0)
        until(lambda: self.site.step() > failed + SETTLED)

    def fault(self, what: str, kind: str, **expected: Any) -> Incident:
        """Put in a fault of the stub trainer, and see it through."""
        self.trained(12)  # one more checkpoint at least
        self.site.fault(what)
        return self.sees(kind, **expected)

    def sees(self, kind: str, seconds: float = PATIENCE, nodes: tuple[str, ...] | None = None) -> Incident:
        """Wait for one more incident, of that kind and on those nodes, and for its proof."""
        self.expected.append(kind)
        number = len(self.expected)

        def proven(state: State) -> Incident | None:
            kinds = [incident.kind for incident in state.incidents.values()]
            assert kinds == self.expected[: len(kinds)], [i.cause for i in state.incidents.values()][-2:]
            newest = list(state.incidents.values())[number - 1 :]
            return newest[0] if newest and newest[0].closed_at is not None else None

        incident: Incident = self.site.wait(proven, seconds)
        assert incident.proven, incident.proof
        if nodes is not None:
            assert incident.nodes == nodes, incident.cause
        return incident

    def sound_before(self, attempt: str) -> int:
        """The newest step of which a sound checkpoint was known when that attempt was intended."""
        known: set[int] = set()
        for entry in self.site.entries():
            event = entry.event
            if isinstance(event, e.CheckpointVerified) and event.healthy:
                known.add(event.checkpoint.step)
            elif isinstance(event, e.AttemptIntended) and event.attempt == attempt:
                break
        return max(known)

    def saved_before_it_left(self, attempt: str) -> int:
        """The step of an attempt when it was asked to leave; it saved before it was ended."""
        events = [entry.event for entry in self.site.entries()]
        leave = next(i for i, x in enumerate(events) if isinstance(x, e.LeaveIntended) and x.attempt == attempt)
        steps = [x.step for x in events[:leave] if isinstance(x, e.AttemptProgressed) and x.attempt == attempt]
        end = next(i for i, x in enumerate(events) if i > leave and isinstance(x, e.StopIntended | e.AttemptEnded))
        seen = [x.checkpoint for x in events[:end] if isinstance(x, e.CheckpointSeen)]
        saved = [x.step for x in seen if x.run == attempt.rpartition("-")[0] and not x.nodes]  # no snapshots
        assert saved[-1] >= steps[-1], "it was ended before it had saved"  # it may have saved just then
        return steps[-1]

    def allow(self, *nodes: str) -> None:
        """Repair nodes: for Slurm and for us."""
        for node in nodes:
            self.site.wait(lambda state, node=node: state.nodes[node].drain == "done")
            ask("scontrol", "update", f"nodename={node}", "state=resume")
            self.site.command("node", "allow", "1", node, "--yes", "-q")
        self.site.wait(lambda s: all(n in s.held and s.nodes[n].reason.startswith("nvml_") for n in nodes))

    def ends(
        self,
        excluded: Collection[str] = (),
        submitted: int = 1,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> State:
        """Let it end, and see that nothing was done beyond what the faults called for.

        `submitted`: as many requests for nodes as they call for; more must have been needed.
        """
        self.trained(1)
        self.site.end_after(250)
        self.expected.append("operator")
        self.site.wait(lambda state: state.ended)
        meanwhile()
        state = self.site.ended()
        assert state.status is Status.COMPLETED, state.why
        kinds = [incident.kind for incident in state.incidents.values()]
        assert kinds == self.expected, [incident.cause for incident in state.incidents.values()]
        assert all(incident.proven for incident in state.incidents.values())
        taken_out = {name: node.excluded_by for name, node in state.nodes.items() if node.excluded_by}
        assert set(taken_out) == set(excluded), taken_out
        self.accounts(submitted)
        return state

    def accounts(self, submitted: int) -> None:
        """Slurm ran what the journal says, nothing twice, and nothing that was not needed."""
        entries = self.site.entries()
        requests_were_needed(entries)
        events = [entry.event for entry in entries]
        ours = {event.job for event in events if isinstance(event, e.AllocationSubmitted)}
        jobs = [line.split("|") for line in ask("sacct", "-n", "-P", "-X", "-o", "JobID,JobName,Comment").split("\n")]
        # a cluster that stays up remembers earlier runs of the tests, whose folder may have had the same name
        jobs = [(job, name, what) for job, name, what in jobs if int(job) >= min(map(int, ours))]
        # what sbatch refuses is in the accounts all the same, as FAILED
        refused = {f"opt-ops-{event.allocation}" for event in events if isinstance(event, e.AllocationFailed)}
        mine = {job: name for job, name, what in jobs if str(self.site.runs) in what and name not in refused}
        assert set(mine) == ours
        assert max(Counter(mine.values()).values()) == 1, mine
        assert len(ours) >= submitted, mine
        until(lambda: ours.isdisjoint(ask("squeue", "-h", "--me", "-o", "%i", "-t", "PD,R").split()))
