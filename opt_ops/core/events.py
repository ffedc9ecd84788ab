"""Every fact that the journal can hold, as a frozen dataclass, and the table of their kinds.

An event is one of three things, and its docstring says which: an *observation* (the world was seen to be so), a
*decision* (what was chosen, with its evidence and rule), or an *intent* (what is about to be done to the world, with an
id of ours). Intents are settled by a later observation or outcome.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.values import (
    Action,
    AllocationStatus,
    Checkpoint,
    Driver,
    Fault,
    LrFactor,
    Optimizer,
    Outcome,
    RankExit,
    Readback,
    Schedule,
    Severity,
    Shape,
    Skip,
    StackGroup,
    Tier,
    Verdict,
)


def _evidence() -> Mapping[str, Any]:
    return {}


# ---- the daemon and its operators -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStarted:
    """Observation: a new life of the daemon took over this lineage."""

    host: str
    pid: int
    version: str
    policy: str
    blind_seconds: float | None  # since the previous life's last sign, None for the first life


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageStarted:
    """Observation: an operator asked for this lineage."""

    request: str
    author: str
    lineage: str
    recipe: str
    settings: tuple[str, ...]
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    shape: Shape
    driver: Driver = Driver.DAEMON


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """Observation: an operator wants the lineage stopped."""

    request: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseRequested:
    """Observation: an operator wants training to rest, after one more checkpoint. The nodes are given back, or kept."""

    request: str
    author: str
    reason: str
    keep_nodes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequested:
    """Observation: an operator wants training to go on: after a pause, after HALTED, or while a person drives."""

    request: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRequested:
    """Observation: an operator wants the next run: from an earlier step, or from here on under other settings.

    `to_step` None: nothing is taken back. `lr` is a learning rate to reach at the next step, by a factor on the
    schedule.
    """

    request: str
    author: str
    reason: str
    to_step: int | None = None
    lr_factor: float | None = None
    lr: float | None = None
    settings: tuple[str, ...] = ()
    skip_batches: int = 0  # that many, from the step that training goes on from


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverChanged:
    """Observation: an operator takes over, or hands back."""

    request: str
    author: str
    driver: Driver
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAllowed:
    """Observation: an operator lets attempts start on a node again. What was held against its parts is forgotten."""

    request: str
    author: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteAdded:
    """Observation: an operator's note about a lineage, run, attempt or incident. Untrusted text."""

    request: str
    author: str
    target: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRequested:
    """Intent: put in a fault on purpose. Settled by `DrillDone`."""

    request: str
    author: str
    drill: str
    fault: Fault
    attempt: str | None
    arguments: Mapping[str, Any] = field(default_factory=_evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillDone:
    """Outcome of `DrillRequested`: the fault is in."""

    drill: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """Decision: an inbox request cannot be carried out."""

    request: str
    author: str
    verb: str
    why: str


# ---- runs, allocations, attempts --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanned:
    """Decision: the next stretch of training under one set of settings. No checkpoint: from scratch."""

    run: str
    parent: str | None
    cause: str
    incident: str | None
    checkpoint: Checkpoint | None
    lr_factors: tuple[LrFactor, ...]
    settings: tuple[str, ...] = ()  # on top of the lineage's
    skips: tuple[Skip, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationIntended:
    """Intent: ask the scheduler for nodes, once. Settled by `AllocationSubmitted` or `AllocationFailed`."""

    allocation: str
    nodes: int
    exclude: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationSubmitted:
    """Outcome of `AllocationIntended`. `adopted` when an earlier life of the daemon had submitted it."""

    allocation: str
    job: str
    adopted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationFailed:
    """Outcome of `AllocationIntended`: the scheduler refused, and no job exists."""

    allocation: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationChanged:
    """Observation: the scheduler says something new about the job."""

    allocation: str
    status: AllocationStatus
    nodes: tuple[str, ...]
    reason: str
    ends_at: float | None = None  # its time limit


@dataclass(frozen=True, slots=True, kw_only=True)
class StrayFound:
    """Intent: cancel a job of this lineage that no live allocation accounts for. Settled by `StrayCancelled`."""

    job: str
    allocation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StrayCancelled:
    """Outcome of `StrayFound`: the scheduler has taken the cancellation."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeDecided:
    """Decision: on how many nodes attempts start from now on."""

    nodes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LineagePaused:
    """Decision: training rests, as an operator asked."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseIntended:
    """Intent: give the nodes back. Settled when `AllocationChanged` says ended."""

    allocation: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptIntended:
    """Intent: start the ranks on these nodes. Settled by `AttemptStarted` or `AttemptEnded`."""

    attempt: str
    run: str
    nodes: tuple[str, ...]
    ranks_per_node: int
    checkpoint: Checkpoint | None
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """Observation: every node's agent has started its ranks."""

    attempt: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptConfigured:
    """Observation: the settings and versions that the trainer says it runs under (its config.json)."""

    attempt: str
    steps: int  # the last one that will be trained
    schedule: Schedule
    optimizer: Optimizer
    versions: Mapping[str, Any]
    layout: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptProgressed:
    """Observation: how far telemetry has come. The first one of an attempt carries its first step."""

    attempt: str
    first_step: int
    first_step_at: float
    step: int
    at: float
    readbacks: tuple[Readback, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveIntended:
    """Intent: end the attempt after one more checkpoint. Settled by `StopIntended` or `AttemptEnded`."""

    attempt: str
    why: str
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StacksIntended:
    """Intent: ask every rank of a hung attempt where it is. Settled by `StacksTaken`."""

    attempt: str
    incident: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StacksTaken:
    """Outcome of `StacksIntended`: the ranks by what they are doing, the largest group first.

    `odd` are the ranks that are not where the most
    are, those that do not answer among them; `nodes` is where they run.
    """

    attempt: str
    incident: str
    groups: tuple[StackGroup, ...]
    odd: tuple[int, ...]
    silent: tuple[int, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopIntended:
    """Intent: end the attempt's processes. Settled by `AttemptEnded`."""

    attempt: str
    why: str
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """Observation: no rank of the attempt runs any more on any node that answers."""

    attempt: str
    outcome: Outcome
    last_step: int | None
    last_step_at: float | None
    exits: tuple[RankExit, ...]
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSeen:
    """Observation: a checkpoint has its commit marker. Settled by `CheckpointVerified` or `CheckpointRefused`."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVerified:
    """Observation: every byte of a checkpoint was read and agrees with its manifest."""

    checkpoint: Checkpoint
    healthy: bool
    why: str  # why it is not healthy; empty when it is


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRefused:
    """Observation: a checkpoint is damaged. It is never chosen again."""

    checkpoint: Checkpoint
    why: str


# ---- what is wrong ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRaised:
    """Observation: a detector's finding. `step` is where it was seen, `onset_step` where it began."""

    signal: str
    tier: Tier
    attempt: str
    step: int | None
    onset_step: int | None
    at: float  # when it began, by the evidence's own clock
    nodes: tuple[str, ...] = ()
    rule: str
    evidence: Mapping[str, Any] = field(default_factory=_evidence)

    @property
    def key(self) -> str:
        """Equal for a finding that is made again, as after a restart of the daemon."""
        return f"{self.signal}/{self.tier}/{self.attempt}/{self.onset_step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJudged:
    """Observation: a node's verdict, with the reason code and who says so. Written when it changes."""

    node: str
    host: str
    verdict: Verdict
    reason: str
    source: str
    at: float
    evidence: Mapping[str, Any] = field(default_factory=_evidence)
    drill: str | None = None


# ---- what is done about it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentOpened:
    """Decision: these findings are one incident of this kind."""

    incident: str
    failure: str  # the class, which triggers a playbook
    cause: str
    detector: str
    attempt: str | None
    nodes: tuple[str, ...]
    step_failed: int | None
    onset_step: int | None
    at: float  # the first evidence
    evidence: Mapping[str, Any] = field(default_factory=_evidence)
    drill: str | None = None
    signal: str | None = None  # the key of the finding behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryDecided:
    """Decision: what a playbook's rung does about an incident."""

    incident: str
    playbook: str
    version: int
    rung: int
    action: Action
    why: str
    checkpoint: Checkpoint | None = None
    lr_factor: float | None = None
    exclude: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    skip_batches: int = 0
    save_first: bool = False  # the attempt is healthy: it leaves after one more checkpoint
    advice: bool = False  # a person drives: said, not done


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeExcluded:
    """Decision of ours or an operator's: no attempt starts on this node any more."""

    node: str
    incident: str  # or `operator`
    reason: str
    request: str | None = None
    author: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainIntended:
    """Intent: ask the scheduler to drain the node. Settled by `NodeDrained`."""

    node: str
    incident: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDrained:
    """Outcome of `DrainIntended`. Not permitted is an outcome too: the node is excluded all the same."""

    node: str
    done: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentClosed:
    """Decision: telemetry shows that the action took effect, or shows that it did not.

    `proven` None: nothing was to be proven, as with advice, or a halt that an operator answered.
    """

    incident: str
    proven: bool | None
    proof: Mapping[str, Any]
    step_resumed: int | None
    steps_lost: int | None
    seconds_down: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageCompleted:
    """Decision: every step is trained."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageHalted:
    """Decision: no rule fits or a budget is spent. A human is needed."""

    why: str
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageCancelled:
    """Decision: stopped as an operator asked."""

    request: str
    why: str


# ---- who is told --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertIntended:
    """Intent: tell people. Settled by `AlertSettled`; sent again after a crash, since twice is better than never."""

    alert: str
    severity: Severity
    title: str
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertSettled:
    """Outcome of `AlertIntended`: delivered, or given up."""

    alert: str
    delivered: bool
    why: str


Event = (
    DaemonStarted
    | LineageStarted
    | StopRequested
    | PauseRequested
    | ResumeRequested
    | ChangeRequested
    | DriverChanged
    | NodeAllowed
    | NoteAdded
    | DrillRequested
    | DrillDone
    | RequestRefused
    | RunPlanned
    | AllocationIntended
    | AllocationSubmitted
    | AllocationFailed
    | AllocationChanged
    | StrayFound
    | StrayCancelled
    | SizeDecided
    | LineagePaused
    | ReleaseIntended
    | AttemptIntended
    | AttemptStarted
    | AttemptConfigured
    | AttemptProgressed
    | LeaveIntended
    | StacksIntended
    | StacksTaken
    | StopIntended
    | AttemptEnded
    | CheckpointSeen
    | CheckpointVerified
    | CheckpointRefused
    | SignalRaised
    | NodeJudged
    | IncidentOpened
    | RecoveryDecided
    | NodeExcluded
    | DrainIntended
    | NodeDrained
    | IncidentClosed
    | LineageCompleted
    | LineageHalted
    | LineageCancelled
    | AlertIntended
    | AlertSettled
)

KINDS: dict[str, type[Event]] = {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in Event.__args__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event with its place in the journal."""

    seq: int
    epoch: int
    ts: float
    event: Event


def kind_of(event: Event) -> str:
    """The event's name in the journal, such as `run_planned`."""
    return _NAMES[type(event)]


_NAMES = {cls: name for name, cls in KINDS.items()}
