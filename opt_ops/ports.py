"""The ports of the supervisor: small Protocols, and the values that cross them.

Adapters implement them. The supervisor reaches the outside in no other way. An adapter that gets no answer raises
`Unavailable`. It never reports an unknown as a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opt_ops.core.detect.point import Point
from opt_ops.core.failures.cause_lines import CauseLine
from opt_ops.core.health import Heartbeat
from opt_ops.core.values import (
    AllocationStatus,
    Checkpoint,
    Deduplicated,
    Optimizer,
    PlannedChange,
    RankExit,
    Schedule,
    Severity,
)


class Clock(Protocol):
    """Wall-clock time and monotonic time."""

    def now(self) -> float:
        """Seconds since the epoch, for the journal and for displays."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump, for every timeout and deadline within one daemon process."""
        ...

    def boot(self) -> str:
        """Since which boot of this host `monotonic` counts: equal for all its processes. Empty: not known."""
        ...


@dataclass(frozen=True, slots=True)
class JobState:
    """What the scheduler reports about a job.

    `nodes` are held if it runs or is suspended. A queued job may have nodes, too, which boot. `unfit`: those nodes on
    which nothing new starts, each with the reason.
    """

    status: AllocationStatus
    nodes: tuple[str, ...]
    reason: str
    unfit: Mapping[str, str] = field(default_factory=dict[str, str])
    ends_at: float | None = None  # its time limit, seconds since the epoch


class Scheduler(Protocol):
    """Holds nodes for a lineage. All methods raise `SchedulerUnavailable` if the scheduler does not answer."""

    grace_seconds: float
    """Seconds after a submission during which its job may still be missing in `jobs`."""

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job named `allocation` that runs a node agent on each of its nodes. Returns the job's id.

        Raises:
            Refused: the scheduler refused it, and no job exists.
            NotYet: the scheduler is being asked. Another call is not another submission.
            SchedulerUnavailable: it is not known whether a job exists.
        """
        ...

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Return (job, allocation) of every queued or running job of this lineage. Two jobs may have one allocation."""
        ...

    def state(self, job: str, allocation: str = "", since: float = 0.0) -> JobState:
        """Return the state of a job, never waiting for the scheduler.

        Args:
            job: Its id, which the scheduler may have given to another job before.
            allocation: The name under which it was submitted; empty: not known.
            since: It was submitted no earlier than this, in seconds since the epoch.

        Raises:
            NotYet: the scheduler is being asked for the first time.
        """
        ...

    def cancel(self, job: str) -> None:
        """Cancel a job. It is no error if the job has ended."""
        ...

    def drain(self, node: str, reason: str) -> None:
        """Drain a node: the scheduler gives it to nobody any more.

        Raises:
            Refused: this user may not drain nodes.
        """
        ...

    def remove_node(self, job: str, node: str) -> None:
        """Remove a dead node from a job, so that its return cannot end what runs on the other nodes.

        Raises:
            Refused: the job needs this node.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who takes part in a running attempt, and where its ranks meet. `Launch.nodes` says on which nodes they run."""

    generation: int
    ranks: tuple[tuple[str, int], ...]  # of each rank its node, and its number there
    new: tuple[int, ...]  # the ranks that start now; all others go on
    address: str  # of the node of rank 0
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What node agents need to know to start an attempt."""

    attempt: str
    nodes: tuple[str, ...]
    holders: Mapping[str, str]  # node → the allocation that holds it: only the agent of that allocation starts ranks
    ranks_per_node: int
    address: str  # of the node of rank 0
    port: int
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    membership: Membership | None = None  # None: that of the launch, generation 1
    warm: Mapping[str, str] = field(default_factory=dict[str, str])
    """Node → the allocation that holds it: nodes that keep a warm process of this trainer, from which ranks start."""
    standbys: Mapping[str, int] = field(default_factory=dict[str, int])
    """Node → warm ranks that wait there for a place. Such a node has a warm process, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drilling:
    """A fault that an agent injects once."""

    drill: str
    fault: str
    node: str | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOrder:
    """What evaluates a checkpoint: a command in a process group of its own."""

    evaluation: str
    node: str | None  # None: beside the daemon
    holder: str | None  # the allocation that holds the node
    argv: tuple[str, ...]
    nice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the node agents should be doing now: a desired state, not a list of steps."""

    epoch: int
    seq: int
    launch: Launch | None
    drills: tuple[Drilling, ...]
    released: tuple[str, ...]  # allocations whose agents exit
    save: str | None = None  # a new value: the ranks save a checkpoint and continue
    dump: str | None = None  # a new value: the ranks write their stacks
    probes: tuple[Launch, ...] = ()  # short runs on one idle node each; `attempt` is the name of the probe
    burn_in_seconds: float = 0.0  # of tests when an agent starts, unless an attempt needs its node already
    evaluate: EvaluationOrder | None = None  # on an idle node, which ends it when anything else needs the node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRanksReport:
    """What an agent reports about the ranks of an attempt on its node."""

    node: str
    started_at: float
    exits: tuple[RankExit, ...]
    done: bool  # all its ranks have ended
    tails: Mapping[int, str] = field(default_factory=dict[int, str])  # rank → last lines of its log; untrusted
    causes: Mapping[int, tuple[CauseLine, ...]] = field(default_factory=dict[int, tuple[CauseLine, ...]])
    """Rank → the lines of its log that name a cause; untrusted. No entry: its agent does not look for them."""
    pids: Mapping[int, tuple[int, int, float]] = field(default_factory=dict[int, tuple[int, int, float]])
    """Rank → generation in which its process began to take part, its pid, and when it started. Of running ranks only.

    `exits` holds those of processes that were replaced, too: each with `generation`.
    """
    joining: Mapping[int, int] = field(default_factory=dict[int, int])
    """Rank → the newest generation that it has begun to join. Of running ranks that say so."""


class Agents(Protocol):
    """The node agents."""

    def heartbeats(self) -> Iterable[Heartbeat]:
        """Return the heartbeats since the last call, oldest first. The result can be iterated once."""
        ...

    def order(self, orders: Orders) -> None:
        """Replace the orders. Equal orders change nothing."""
        ...

    def reports(self, attempt: str) -> Mapping[str, NodeRanksReport]:
        """Return the reports on an attempt, by node."""
        ...

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """Return the stacks that were written at request `dump`, by rank. Empty: no answer. Missing: not known yet."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The effective settings that the trainer reports."""

    steps: int
    batch: int | None = None  # sequences of the global batch
    schedule: Schedule
    optimizer: Optimizer
    versions: Mapping[str, Any]
    layout: Mapping[str, Any]
    planned: tuple[PlannedChange, ...] = ()
    data: str | None = None  # digest of what it trains on
    dedup: tuple[Deduplicated, ...] = ()  # what was removed from it before
    capabilities: tuple[str, ...] = ()  # what the trainer can do beyond the contract


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPhase:
    """A phase of the trainer: start, training, evaluation, saving or ending."""

    name: str
    since: float
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoined:
    """A generation of the membership whose ranks have come together."""

    generation: int
    step: int  # whose state all ranks hold
    at: float
    repeated: int = 0  # steps that some rank had made beyond it, at most


class Trainer(Protocol):
    """The files of an attempt's training processes."""

    def config(self, attempt: str) -> TrainerConfig | None:
        """Return the settings; None until they are written."""
        ...

    def points(self, attempt: str) -> Sequence[Point]:
        """Return the telemetry since the last call for this attempt, oldest first."""
        ...

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """Return the phase changes since the last call for this attempt, oldest first."""
        ...

    def members(self, attempt: str) -> Sequence[Rejoined]:
        """Return the generations that came together since the last call for this attempt, oldest first."""
        ...

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Inject faults into the attempt's trainer."""
        ...


class CheckpointStore(Protocol):
    """Committed checkpoints. The examination reads every byte, so it runs in the background."""

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Return the checkpoints of a run that have a commit marker, oldest first."""
        ...

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare a checkpoint with its manifest, unless that is under way."""
        ...

    def written(self, checkpoint: Checkpoint) -> int:
        """Return a number that changes when the checkpoint is committed again; 0 if it is gone."""
        ...

    def pin(self, checkpoint: Checkpoint, holder: str = "") -> None:
        """Protect a checkpoint from pruning, if it still exists: until `holder` lets it go, or for good."""
        ...

    def unpin(self, checkpoint: Checkpoint, holder: str) -> None:
        """End the protection that `holder` asked for."""
        ...

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """Return the examinations that ended since the last call, each with its problem; empty: no problem."""
        ...


class Evaluations(Protocol):
    """Evaluations beside the daemon, one at a time of all its lineages. They end with it."""

    def follow(self, wanted: EvaluationOrder | None) -> None:
        """Start what is wanted when it is its turn, once; end what is no longer wanted."""
        ...

    def ended(self) -> Sequence[tuple[str, int]]:
        """Return the evaluations of this lineage that ended by themselves since the last call, with their codes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request of an operator."""

    request: str
    author: str
    verb: str
    arguments: Mapping[str, Any]
    unusable: str = ""
    """Why the arguments cannot be taken as they are, whatever the verb; empty: they can."""
    asked_at: float | None = None
    """When it was made, by the clock of the command's host; None: now."""


class Inbox(Protocol):
    """The requests that commands left for the daemon."""

    def requests(self) -> Sequence[Request]:
        """Return the waiting requests, oldest first."""
        ...

    def done(self, request: str) -> None:
        """Remove a request that is journaled."""
        ...


@dataclass(frozen=True, slots=True)
class Alert:
    """A message for on-call. Title and body may hold untrusted text, and are never markup."""

    id: str  # the same for the same fact, so that a repetition can be recognised
    severity: Severity
    title: str
    body: str


class Notifier(Protocol):
    """Delivers alerts in the background, because delivery takes as long as the network takes."""

    def send(self, alert: Alert) -> None:
        """Begin to deliver an alert, unless that is under way."""
        ...

    def delivered(self) -> Sequence[tuple[str, str]]:
        """Return the deliveries that ended since the last call: alert id and problem; empty: it was delivered."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was left out of one file because it is not what docs/formats.md says. The examples hold untrusted text."""

    source: str  # what kind of file: telemetry, heartbeats, …
    file: str  # relative to the lineage's folder
    count: int  # records (lines, or whole files) that were left out wholly or in part
    taken: int  # records that were taken
    first: str
    newest: str


class Inputs(Protocol):
    """What the readers of the other ports leave out."""

    def left_out(self) -> Sequence[LeftOut]:
        """Return the counts since this daemon process began, one for each file of which anything was left out."""
        ...


class NoInputs:
    """Inputs of which nothing is left out: those that no reader of files brings."""

    def left_out(self) -> Sequence[LeftOut]:
        """Return nothing."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """All ports of one lineage's supervisor."""

    clock: Clock
    scheduler: Scheduler
    agents: Agents
    trainer: Trainer
    checkpoints: CheckpointStore
    inbox: Inbox
    notifier: Notifier
    evaluations: Evaluations
    inputs: Inputs = field(default_factory=NoInputs)
