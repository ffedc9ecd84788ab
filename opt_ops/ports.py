"""What the supervisor needs from the world: small Protocols, the values that cross them, and nothing else.

Adapters implement them; the supervisor knows no other way out. An adapter that cannot find out raises `Unavailable`:
not knowing is never reported as a state of the world.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opt_ops.core.detect.point import Point
from opt_ops.core.health import Heartbeat
from opt_ops.core.values import AllocationStatus, Checkpoint, Optimizer, RankExit, Schedule, Severity


class Clock(Protocol):
    """Time."""

    def now(self) -> float:
        """Seconds since the epoch: for people and for what is journaled."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump: for every measured silence and every deadline within one life."""
        ...


@dataclass(frozen=True, slots=True)
class JobState:
    """What the scheduler says of a job, and of those of its nodes on which it would start nothing new."""

    status: AllocationStatus
    nodes: tuple[str, ...]
    reason: str
    unfit: Mapping[str, str] = field(default_factory=dict[str, str])
    ends_at: float | None = None  # its time limit, seconds since the epoch


class Scheduler(Protocol):
    """Holds nodes for us. Methods raise `SchedulerUnavailable` when there is no answer."""

    grace_seconds: float
    """How long after a submission a job may still turn up that `find` does not see yet."""

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Ask for nodes under the name `allocation`, each to run a node agent; the job's id.

        Raises:
            Refused: the scheduler said no, and no job exists.
            NotYet: it is being asked. Another call is not another submission.
            SchedulerUnavailable: nobody knows whether a job came of it.
        """
        ...

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Every job of this lineage that is queued or runs, with its allocation's name. Two may have the same."""
        ...

    def state(self, job: str) -> JobState:
        """What becomes of the job."""
        ...

    def cancel(self, job: str) -> None:
        """End the job. Ending one that has ended is no error."""
        ...

    def drain(self, node: str, reason: str) -> None:
        """Ask that nobody gets the node any more.

        Raises:
            Refused: not permitted here.
        """
        ...

    def remove_node(self, job: str, node: str) -> None:
        """Take a dead node out of the job, so that its return cannot end what runs on the others.

        Raises:
            Refused: the job cannot do without it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """An attempt, as the node agents need to know it."""

    attempt: str
    nodes: tuple[str, ...]
    holders: Mapping[str, str]  # node → the allocation through which it is held: only that one's agent starts ranks
    ranks_per_node: int
    address: str  # of the node of rank 0
    port: int
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Drilling:
    """A fault for an agent to put in once."""

    drill: str
    fault: str
    node: str | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the agents should be doing now: a wish about the state of things, not a list of steps."""

    epoch: int
    seq: int
    launch: Launch | None
    drills: tuple[Drilling, ...]
    released: tuple[str, ...]  # allocations whose agents leave
    save: str | None = None  # at a new value: the ranks save a checkpoint and go on
    dump: str | None = None  # at a new value: the ranks write down where they are
    burn_in_seconds: float = 0.0  # that an agent tests its node for when it begins, unless its ranks are wanted already


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What an agent says of its part of an attempt."""

    node: str
    started_at: float
    exits: tuple[RankExit, ...]
    done: bool  # none of its ranks runs any more
    tails: Mapping[int, str] = field(default_factory=dict[int, str])  # rank → last lines of its log; untrusted


class Agents(Protocol):
    """The node agents."""

    def heartbeats(self) -> Iterable[Heartbeat]:
        """Those that came since the last call, oldest first; to be gone through once."""
        ...

    def order(self, orders: Orders) -> None:
        """Make these the orders. Ordering the same again changes nothing."""
        ...

    def reports(self, attempt: str) -> Mapping[str, NodeReport]:
        """By node."""
        ...

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """What each rank wrote down at that request, by rank. Empty: it did not answer; missing: nobody knows yet."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What the trainer says that it runs under."""

    steps: int
    schedule: Schedule
    optimizer: Optimizer
    versions: Mapping[str, Any]
    layout: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPhase:
    """What a trainer is at: start, training, evaluation, saving or ending."""

    name: str
    since: float
    step: int | None


class Trainer(Protocol):
    """What the training processes write."""

    def config(self, attempt: str) -> TrainerConfig | None:
        """None until it is written."""
        ...

    def points(self, attempt: str) -> Sequence[Point]:
        """Telemetry that came since the last call for this attempt, oldest first."""
        ...

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """The changes of phase that came since the last call for this attempt, oldest first."""
        ...

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Put faults into the attempt's trainer."""
        ...


class CheckpointStore(Protocol):
    """Committed checkpoints. Examination reads every byte, so it runs in the background."""

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Those of the run that have their commit marker, oldest first."""
        ...

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare it with its manifest. Asking again while it lasts changes nothing."""
        ...

    def pin(self, checkpoint: Checkpoint) -> None:
        """Forbid that it is pruned, if it is still there."""
        ...

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """The examinations that ended since the last call, each with what is wrong; empty if nothing is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an operator asks for."""

    request: str
    author: str
    verb: str
    arguments: Mapping[str, Any]


class Inbox(Protocol):
    """Requests from the commands."""

    def requests(self) -> Sequence[Request]:
        """Those that are waiting, oldest first."""
        ...

    def done(self, request: str) -> None:
        """It is journaled: take it out."""
        ...


@dataclass(frozen=True, slots=True)
class Alert:
    """What people are told. Title and body may hold untrusted text, and are never markup."""

    id: str  # the same for the same fact, so that a repetition can be told
    severity: Severity
    title: str
    body: str


class Notifier(Protocol):
    """Tells people. Delivery takes as long as the network does, so it happens in the background."""

    def send(self, alert: Alert) -> None:
        """Begin to deliver it. Asking again while that lasts changes nothing."""
        ...

    def delivered(self) -> Sequence[tuple[str, str]]:
        """The deliveries that ended since the last call: the alert's id, and what went wrong; empty if nothing did."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything that one lineage's supervisor can touch."""

    clock: Clock
    scheduler: Scheduler
    agents: Agents
    trainer: Trainer
    checkpoints: CheckpointStore
    inbox: Inbox
    notifier: Notifier
