"""What a lineage's state is made of: runs, attempts, nodes, incidents, numbers.

`opt_ops.core.state.fold` computes it from the journal; nothing else changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opt_ops.core.events import (
    AlertIntended,
    ChangeRequested,
    CheckpointEvaluated,
    CheckpointSampled,
    InputLeftOut,
    LineageStarted,
    PauseRequested,
    ProbeEnded,
    ProbesIntended,
    ProposalAnswered,
    ProposalMade,
    RecoveryDecided,
    ResumeRequested,
    SignalRaised,
    StacksTaken,
    StopRequested,
)
from opt_ops.core.failures.causes import Suspicion
from opt_ops.core.state.attempts import Attempt, Run
from opt_ops.core.state.checkpoints import Evaluation, KnownCheckpoint
from opt_ops.core.values import (
    ENDED,
    HOLDING,
    Action,
    AllocationStatus,
    AskDefault,
    AskTerms,
    Driver,
    Fault,
    GpuPart,
    PlannedChange,
    ProposalStatus,
    Severity,
    Shape,
    Status,
    Verdict,
)
from opt_ops.core.versions import VersionedSet, Versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The nodes held: one job of the scheduler."""

    name: str
    wanted: int
    exclude: tuple[str, ...]
    intended_at: float
    epoch: int
    job: str | None = None
    status: AllocationStatus = AllocationStatus.QUEUED
    nodes: tuple[str, ...] = ()
    since: float = 0.0
    reason: str = ""
    ends_at: float | None = None  # its time limit
    ran: bool = False  # whether it ever held nodes
    release_at: float | None = None
    failed: str | None = None
    unknown_since: float | None = None  # when the scheduler last said nothing that is understood; None: it is known

    @property
    def live(self) -> bool:
        """Whether it is, or may be, known to the scheduler."""
        return self.failed is None and self.status is not AllocationStatus.ENDED

    @property
    def holds(self) -> bool:
        """Whether its nodes are ours. Those of a suspended one are, but nothing runs there for now."""
        return self.live and self.status in HOLDING and self.release_at is None

    @property
    def suspended(self) -> bool:
        """Whether the scheduler has stopped its processes, until it resumes them."""
        return self.live and self.status is AllocationStatus.SUSPENDED

    @property
    def pending(self) -> bool:
        """Whether nodes may still come of it."""
        return self.live and self.release_at is None and self.status is AllocationStatus.QUEUED


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is known of a node, and whether attempts may start on it."""

    name: str
    host: str = ""
    verdict: Verdict = Verdict.UNKNOWN
    reason: str = "not_heard_of"
    source: str = ""
    at: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    drill: str | None = None
    excluded_by: str | None = None  # an incident, or `operator`
    excluded_at: float = 0.0
    allowed_at: float = 0.0  # by an operator, whatever was found before
    drain: str | None = None  # intended, done, refused
    gpus: tuple[GpuPart, ...] = ()
    standby: int = 0  # warm ranks that wait there


@dataclass(frozen=True, slots=True, kw_only=True)
class Afterthought:
    """What later steps show about an incident that is over."""

    topic: str
    text: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a person was asked about an incident."""

    made: ProposalMade
    at: float
    answer: ProposalAnswered | None = None  # the first one
    answered_at: float | None = None

    @property
    def name(self) -> str:
        """Such as 12-i007-p1."""
        return self.made.proposal

    @property
    def status(self) -> ProposalStatus:
        """Where it stands."""
        return ProposalStatus.OPEN if self.answer is None else self.answer.status

    @property
    def is_refused(self) -> bool:
        """Whether it is not done: a person declined it, or nobody answered and its default is to wait."""
        expired = self.status is ProposalStatus.EXPIRED and self.made.default is AskDefault.WAIT
        return expired or self.status is ProposalStatus.DECLINED


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Everything from the first evidence to the proven recovery."""

    name: str
    kind: str
    cause: str
    detector: str
    attempt: str | None
    nodes: tuple[str, ...]
    step_failed: int | None
    onset_step: int | None
    at: float
    opened_at: float
    opened_epoch: int
    evidence: Mapping[str, Any]
    drill: str | None
    signal: str | None = None  # the key of the finding behind it
    margin_steps: int = 0  # a rollback goes back to at least so many steps before the onset
    causes: tuple[Suspicion, ...] = ()  # what may be behind it, the likeliest first
    stacks_at: float | None = None  # when every rank was asked where it is
    stacks: StacksTaken | None = None
    probes: ProbesIntended | None = None
    probe_ends: tuple[ProbeEnded, ...] = ()
    probes_judged: bool = False
    decision: RecoveryDecided | None = None
    decided_at: float | None = None
    next_attempt: str | None = None
    closed_at: float | None = None
    proven: bool | None = None
    proof: Mapping[str, Any] = field(default_factory=dict[str, Any])
    step_resumed: int | None = None
    steps_lost: int | None = None
    seconds_down: float | None = None
    fell_back: str | None = None  # why ranks were not replaced in place, although that was tried
    answered: bool = False  # a person has decided since: it neither halts nor counts any more
    afterthoughts: tuple[Afterthought, ...] = ()
    proposals: tuple[Proposal, ...] = ()  # about its recovery, oldest first; one at most is open

    @property
    def proposal(self) -> Proposal | None:
        """The newest proposal."""
        return self.proposals[-1] if self.proposals else None

    @property
    def acted_on(self) -> bool:
        """Whether the decision is executed: advice is not, and neither is a mere notification."""
        return self.decision is not None and not self.decision.advice and self.decision.action is not Action.NOTIFY

    @property
    def lost_ranks(self) -> frozenset[int]:
        """The ranks whose processes the evidence names as ended."""
        rank = self.evidence.get("rank")
        named: Any = self.evidence.get("lost_ranks", () if rank is None else (rank,))
        return frozenset(map(int, named))

    @property
    def replaces_ranks(self) -> bool:
        """Whether the decision is to replace ranks while the others keep running."""
        return self.decision is not None and self.decision.action is Action.REPLACE_RANKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """A fault that an operator had injected."""

    name: str
    fault: Fault
    attempt: str | None
    arguments: Mapping[str, Any]
    author: str
    at: float
    epoch: int
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertState:
    """An alert; `delivered` is None while it is on its way."""

    told: AlertIntended
    at: float
    delivered: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing:
    """A part of the watch that fails and is skipped."""

    why: str
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A lineage, as its journal tells it. Mappings keep the order in which things happened."""

    status: Status = Status.NEW
    since: float = 0.0
    seq: int = 0
    epoch: int = 0
    blind_seconds: float | None = None  # an attempt ran while no daemon watched, for this long
    lineage: LineageStarted | None = None
    started_at: float = 0.0
    runs: Mapping[str, Run] = field(default_factory=dict[str, Run])
    attempts: Mapping[str, Attempt] = field(default_factory=dict[str, Attempt])
    allocations: Mapping[str, Allocation] = field(default_factory=dict[str, Allocation])
    live: tuple[str, ...] = ()
    """The allocations that the scheduler knows, or may know of, oldest first: of hundreds most are over."""
    held: Mapping[str, Allocation] = field(default_factory=dict[str, Allocation])
    """The nodes that are ours to use, each with the allocation through which; see `held_nodes`."""
    nodes: Mapping[str, Node] = field(default_factory=dict[str, Node])
    checkpoints: Mapping[str, KnownCheckpoint] = field(default_factory=dict[str, KnownCheckpoint])  # by path
    signals: Mapping[str, SignalRaised] = field(default_factory=dict[str, SignalRaised])
    incidents: Mapping[str, Incident] = field(default_factory=dict[str, Incident])
    open_incidents: tuple[str, ...] = ()
    """Those that are not closed, oldest first: of thousands most are."""
    drills: Mapping[str, Drill] = field(default_factory=dict[str, Drill])
    requests: AbstractSet[str] = field(default_factory=VersionedSet)
    stop: StopRequested | None = None
    paused: PauseRequested | None = None
    resumed: ResumeRequested | None = None  # and not acted on yet
    resumed_after_halt: bool = False  # or in advisory mode: a person has looked, and training goes on
    planned: tuple[PlannedChange, ...] = ()  # what operators declared, or let go on
    changes: Mapping[str, ChangeRequested] = field(default_factory=dict[str, ChangeRequested])  # by request
    driver: Driver = Driver.DAEMON
    ask: AskTerms = field(default_factory=AskTerms)  # how the operator wants to be asked
    size: int = 0  # nodes that attempts start on; 0: as many as the lineage's shape says
    orphan_jobs: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # jobs to be cancelled, with their allocations
    bad_parts: Mapping[str, str] = field(default_factory=dict[str, str])  # GPU UUID → what it did
    alerts: Mapping[str, AlertState] = field(default_factory=dict[str, AlertState])
    left_out: Mapping[str, InputLeftOut] = field(default_factory=dict[str, InputLeftOut])  # by `left_out_key`
    failing: Mapping[str, Failing] = field(default_factory=dict[str, Failing])  # by part of the watch
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict[str, Evaluation])  # by name, in order
    scores: Mapping[str, CheckpointEvaluated] = field(
        default_factory=dict[str, CheckpointEvaluated]
    )  # by `score_key`, as they were journaled
    samples: Mapping[str, CheckpointSampled] = field(
        default_factory=dict[str, CheckpointSampled]
    )  # by digest of the checkpoint
    why: str = ""  # of an ended or paused lineage
    asked_at: float = 0.0  # when a person last asked for it to go on

    @property
    def run(self) -> Run | None:
        """The newest run."""
        return _last(self.runs)

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt."""
        return _last(self.attempts)

    @property
    def allocation(self) -> Allocation | None:
        """The newest allocation. There may be older ones that hold nodes, too."""
        return _last(self.allocations)

    @property
    def live_allocations(self) -> Sequence[Allocation]:
        """Those that the scheduler knows, or may know of, oldest first."""
        return tuple(self.allocations[name] for name in self.live)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of a checkpoint that runs, or waits for its turn: there is one at most."""
        newest = _last(self.evaluations)
        return newest if newest is not None and newest.end is None else None

    @property
    def intent(self) -> LineageStarted:
        """What was asked for. Only for a lineage that was started."""
        assert self.lineage is not None
        return self.lineage

    @property
    def shape(self) -> Shape:
        """What was asked of the cluster."""
        return self.intent.shape

    @property
    def wanted_nodes(self) -> int:
        """On how many nodes attempts start."""
        return self.size or self.shape.nodes

    @property
    def ended(self) -> bool:
        """Whether nothing more will be trained, unless an operator resumes it."""
        return self.status in ENDED

    @property
    def released(self) -> bool:
        """Whether the lineage has ended and holds nothing of the cluster any more: no processes, no nodes."""
        return (
            self.ended
            and not (self.attempt and self.attempt.live)
            and not self.live_allocations
            and not self.orphan_jobs
        )

    @property
    def settled(self) -> bool:
        """Whether only pages are left to deliver, which are tried for as long as it takes."""
        waiting = (alert.told.severity for alert in self.alerts.values() if alert.delivered is None)
        idle = self.released and self.evaluation is None
        return idle and all(severity is Severity.PAGE for severity in waiting)

    @property
    def finished(self) -> bool:
        """Whether the lineage has ended and nothing is open: no processes, no nodes, no intent, no alert."""
        return self.settled and all(alert.delivered is not None for alert in self.alerts.values())


_T = TypeVar("_T")


def _last(mapping: Mapping[str, _T]) -> _T | None:
    if isinstance(mapping, Versions):
        return mapping.newest()
    return next(reversed(mapping.values()), None)  # type: ignore[call-overload]


def left_out_key(source: str, file: str) -> str:
    """The name of a file of which records were left out, in `State.left_out`."""
    return f"{source} {file}"


def held_nodes(live: Iterable[Allocation]) -> dict[str, Allocation]:
    """The nodes of all live allocations that hold some. A node that is held through two is the older one's."""
    held: dict[str, Allocation] = {}
    for allocation in live:
        for node in allocation.nodes if allocation.holds else ():
            held.setdefault(node, allocation)
    return held
