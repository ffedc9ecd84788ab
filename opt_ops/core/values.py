"""The small values that events and state are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """Where a lineage stands. `opt_ops/core/state/status.py` says what follows what."""

    NEW = "NEW"  # a folder with a request in it; nothing is journaled yet
    PLANNED = "PLANNED"  # the first run has its settings
    QUEUED = "QUEUED"  # nodes were asked for
    PREFLIGHT = "PREFLIGHT"  # nodes are held; waiting until enough of them report and are fit
    STARTING = "STARTING"  # ranks were ordered; no step yet
    TRAINING = "TRAINING"  # steps come
    ROLLING_BACK = "ROLLING_BACK"  # a rollback was decided
    RECOVERING = "RECOVERING"  # a restart without rollback was decided
    PAUSED = "PAUSED"  # an operator paused it
    COMPLETED = "COMPLETED"  # every step is trained
    HALTED = "HALTED"  # no rule fits or a retry budget is spent: on-call was paged
    CANCELLED = "CANCELLED"  # an operator stopped it


ENDED = frozenset({Status.COMPLETED, Status.HALTED, Status.CANCELLED})


class Tier(StrEnum):
    """How much a signal asks for."""

    ALERT = "alert"  # keep the last good checkpoint, notify on-call
    ACT = "act"  # a playbook decides


class Verdict(StrEnum):
    """A node's health. Silence and blindness are `UNKNOWN`, never `HEALTHY` and never `BAD`."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    BAD = "bad"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "completed"  # every rank left with code 0
    FAILED = "failed"  # a rank failed by itself
    STOPPED = "stopped"  # we stopped it
    LOST = "lost"  # the allocation went away under it


class Action(StrEnum):
    """What a playbook may do about an incident."""

    REPLACE_RANKS = "replace_ranks"  # the attempt goes on; new ranks take the place of those that are lost
    RESTART = "restart"  # next attempt of the same run, from its newest good checkpoint
    ROLLBACK = "rollback"  # next run, from a checkpoint before the onset, with the learning rate lowered
    RECONFIGURE = "change"  # next run, from the newest good checkpoint, under other settings
    EXCLUDE = "exclude"  # exclude the node; no running training is touched
    ADOPT = "adopt"  # take over what is already running
    NOTIFY = "tell"  # leave training alone, and page on-call
    HALT = "halt"  # stop, and page on-call
    COMPLETE = "complete"  # every step is trained: nothing is started again


class Driver(StrEnum):
    """Who acts on what the daemon decides."""

    DAEMON = "daemon"
    OPERATOR = "person"  # an operator took over: the daemon watches and reports, and acts only on requests
    SHADOW = "shadow"  # another launcher runs the training: the daemon never acts
    ASK = "ask"  # the daemon acts, and asks a person before it restarts or rolls back

    @property
    def acts(self) -> bool:
        """Whether the daemon carries out its own decisions; with `ASK`, some of them only once they are approved."""
        return self in (Driver.DAEMON, Driver.ASK)


class AskDefault(StrEnum):
    """What happens with a proposal that nobody has answered by its deadline."""

    ACT = "act"  # it is done
    WAIT = "wait"  # it is not done


class ProposalStatus(StrEnum):
    """Where a proposal stands."""

    OPEN = "open"
    APPROVED = "approved"
    DECLINED = "declined"
    EXPIRED = "expired"  # nobody answered by the deadline: its default holds
    WITHDRAWN = "withdrawn"  # what was shown no longer holds


class EvaluationEnd(StrEnum):
    """How an evaluation of a checkpoint ended."""

    DONE = "done"  # its results are in the lineage's folder
    FAILED = "failed"  # the harness failed
    GIVEN_UP = "given_up"  # its node was needed: the checkpoint waits for the next idle one
    LOST = "lost"  # its node, or the daemon that ran it, went away


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A fixed prompt, and how a checkpoint goes on with it. Untrusted texts."""

    prompt: str
    greedy: str
    drawn: str  # with a fixed seed


@dataclass(frozen=True, slots=True, kw_only=True)
class AskTerms:
    """How an operator wants to be asked. What is None is as the playbook pages say."""

    default: AskDefault | None = None
    seconds: float | None = None  # from the proposal to its deadline
    only: tuple[Action, ...] = ()  # actions that are asked about; empty: every action that can be


class Severity(StrEnum):
    """How urgent an alert is."""

    INFO = "info"
    WARNING = "warning"
    PAGE = "page"  # somebody must act now


class Fault(StrEnum):
    """A fault that a drill injects."""

    LR = "lr"  # the trainer multiplies its learning rate for some updates
    NAN = "nan"  # the trainer makes the loss of an update NaN
    FLIP_BIT = "flip-bit"  # a rank of the trainer flips a bit of its weights
    KILL_RANK = "kill-rank"  # the node's agent kills the rank with SIGKILL, or the rank itself at a place of a step
    KILL_NODE = "kill-node"  # the node's agent kills all of its ranks with SIGKILL
    KILL_PAIR = "kill-pair"  # agents kill a rank and the one that keeps its copy, at once
    SLOW_STANDBY = "slow-standby"  # processes that take the place of lost ranks wait before they join
    HANG = "hang"  # the node's agent stops the rank with SIGSTOP
    XID = "xid"  # the node's agent finds an Xid line in its kernel log
    KILL_DAEMON = "kill-daemon"  # the daemon is killed with SIGKILL


PREEMPTED = "PREEMPTED"
"""The scheduler's reason for the end of a job, or for an end that it has brought forward."""


class AllocationStatus(StrEnum):
    """What the scheduler says of our job. `UNKNOWN` when it does not answer: nothing follows from that."""

    QUEUED = "queued"
    RUNNING = "running"
    SUSPENDED = "suspended"  # its nodes are ours, its processes are stopped until the scheduler resumes it
    ENDED = "ended"
    UNKNOWN = "unknown"


HOLDING = frozenset({AllocationStatus.RUNNING, AllocationStatus.SUSPENDED})
"""With these, the nodes of the job are ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where training can go on from: the folder, and the run and step that wrote it.

    Of a snapshot, `nodes` says whose disks it is on: of each group, one node must take part in the attempt.
    """

    run: str
    step: int
    path: str
    nodes: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What a fork begins from: the lineage and run that wrote the checkpoint, its step, and its folder."""

    lineage: str
    run: str
    step: int
    checkpoint: str

    @property
    def saved(self) -> Checkpoint:
        """The parent's checkpoint."""
        return Checkpoint(run=self.run, step=self.step, path=self.checkpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class LrFactor:
    """Multiplies the schedule in every update after `step`."""

    step: int
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Batches of the data that are not trained on: `first` to `last` of the original order, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSince:
    """What every update after `step` is trained on: corpora as `run start --data` takes them."""

    step: int
    data: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedChange:
    """Something that changes on purpose from update `step` on: a data stage, a batch size, settings."""

    step: int
    what: str = ""  # untrusted text
    by: str = ""  # the author of the request, or the attempt; empty: the trainer's config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduplicated:
    """What was removed from text to train on, as `python -m trainer.data.dedup` says."""

    source: str
    digest: str
    threshold: float  # Jaccard index of near copies
    documents_in: int
    documents_out: int
    removed: Mapping[str, int]  # by reason
    against: Mapping[str, int] = field(default_factory=dict[str, int])
    """By file of test texts, with the folder above it: how many documents were removed because of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a lineage asks of the cluster."""

    nodes: int
    spares: int
    ranks_per_node: int
    min_nodes: int = 0  # rather train on as few as these than wait; 0: never on fewer than `nodes`

    @property
    def least(self) -> int:
        """The fewest nodes on which an attempt may start."""
        return self.min_nodes or self.nodes


LINEAR = "linear"
"""Linear warm-up, then linear decay: the kind of a schedule that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The trainer's learning-rate schedule, as its config.json states it. docs/formats.md says what the fields do."""

    peak_lr: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 0
    final_fraction: float = 0.0  # of the peak, at the end
    kind: str = LINEAR  # of one that `core/schedule.py` does not compute, only the factors can be proven
    delay: int = 0  # updates by which it lags
    warmup_from: float = 0.0  # of the peak, where the warm-up begins
    cycles: float = 0.5  # of `cosine`
    power: float = 1.0  # of `polynomial`
    decay_steps: int = 0  # of `wsd`
    decay: str = LINEAR  # of `wsd`
    knots: tuple[tuple[float, float], ...] = ()  # of `table`: (update, learning rate), ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """The optimizer's settings that a rollback must find unchanged."""

    betas: tuple[float, ...]
    weight_decay: float
    clip_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Readback:
    """What the live optimizer used for one update, from telemetry."""

    step: int
    lr: float
    betas: tuple[float, ...]
    weight_decay: float
    clip_norm: float
    loss: float | None
    base_lr: float | None = None  # what the trainer's schedule alone gave; None: telemetry does not say it
    position: int | None = None  # samples used up to this update; only of the first ones after a replacement of ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StackGroup:
    """Ranks that are in the same place: their frames, innermost first. Untrusted text."""

    ranks: tuple[int, ...]
    frames: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPart:
    """A GPU as a part that may move to another node."""

    uuid: str
    serial: str | None
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """How one rank ended. `signal` is set when it was killed, `code` when it left by itself."""

    rank: int
    node: str
    code: int | None
    signal: int | None
    at: float
    generation: int = 1  # the last one of the membership that it took part in
