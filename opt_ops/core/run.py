"""What a lineage's state is made of: statuses and their allowed transitions, runs, attempts, nodes, incidents, numbers.

`opt_ops.core.fold` computes it from the journal; nothing else changes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from opt_ops.core.events import LineageStarted, RecoveryDecided, SignalRaised, StopRequested
from opt_ops.core.values import (
    AllocationStatus,
    Checkpoint,
    Fault,
    LrFactor,
    Optimizer,
    Outcome,
    RankExit,
    Readback,
    Schedule,
    Verdict,
)


class Status(StrEnum):
    """Where a lineage stands."""

    NEW = "NEW"  # a folder with a request in it; nothing is journaled yet
    PLANNED = "PLANNED"  # the first run has its settings
    QUEUED = "QUEUED"  # nodes were asked for
    PREFLIGHT = "PREFLIGHT"  # nodes are held; waiting until enough of them report and are fit
    STARTING = "STARTING"  # ranks were ordered; no step yet
    TRAINING = "TRAINING"  # steps come
    ROLLING_BACK = "ROLLING_BACK"  # a rollback was decided
    RECOVERING = "RECOVERING"  # a restart without rollback was decided
    COMPLETED = "COMPLETED"  # every step is trained
    HALTED = "HALTED"  # no rule fits or a budget is spent: a human was called
    CANCELLED = "CANCELLED"  # an operator stopped it


ENDED = frozenset({Status.COMPLETED, Status.HALTED, Status.CANCELLED})

_RECOVERY = frozenset({Status.ROLLING_BACK, Status.RECOVERING})

TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.NEW: frozenset({Status.PLANNED}),
    Status.PLANNED: frozenset({Status.QUEUED}) | ENDED,
    Status.QUEUED: frozenset({Status.QUEUED, Status.PREFLIGHT}) | _RECOVERY | ENDED,
    Status.PREFLIGHT: frozenset({Status.QUEUED, Status.STARTING}) | _RECOVERY | ENDED,
    Status.STARTING: frozenset({Status.TRAINING, Status.STARTING}) | _RECOVERY | ENDED,
    Status.TRAINING: _RECOVERY | ENDED,
    Status.ROLLING_BACK: frozenset({Status.QUEUED, Status.PREFLIGHT, Status.STARTING}) | _RECOVERY | ENDED,
    Status.RECOVERING: frozenset({Status.QUEUED, Status.PREFLIGHT, Status.STARTING}) | _RECOVERY | ENDED,
    Status.COMPLETED: frozenset(),
    Status.HALTED: frozenset({Status.CANCELLED}),
    Status.CANCELLED: frozenset(),
}


class IllegalTransition(ValueError):
    """An event that cannot follow: a fault of ours, raised before the event is journaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A stretch of the lineage under one set of settings."""

    name: str
    parent: str | None
    cause: str
    incident: str | None
    checkpoint: Checkpoint | None
    lr_factors: tuple[LrFactor, ...]
    planned_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One launch of the training processes."""

    name: str
    run: str
    nodes: tuple[str, ...]
    ranks_per_node: int
    checkpoint: Checkpoint | None
    incident: str | None  # the one that this attempt recovers from
    intended_at: float
    started_at: float | None = None
    steps: int | None = None
    schedule: Schedule | None = None
    optimizer: Optimizer | None = None
    versions: Mapping[str, Any] | None = None
    first_step: int | None = None
    first_step_at: float | None = None
    last_step: int | None = None
    last_step_at: float | None = None
    readbacks: tuple[Readback, ...] = ()
    progress_epoch: int = 0  # the life of the daemon that last saw it advance
    stop_why: str | None = None
    stop_at: float | None = None
    stop_seq: int | None = None
    outcome: Outcome | None = None
    ended_at: float | None = None
    exits: tuple[RankExit, ...] = ()

    @property
    def live(self) -> bool:
        """Whether its processes may still run."""
        return self.outcome is None


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
    ran: bool = False  # whether it ever held nodes
    release_at: float | None = None
    failed: str | None = None

    @property
    def live(self) -> bool:
        """Whether it is, or may be, known to the scheduler."""
        return self.failed is None and self.status is not AllocationStatus.ENDED


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
    excluded_by: str | None = None
    drain: str | None = None  # intended, done, refused


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
    decision: RecoveryDecided | None = None
    decided_at: float | None = None
    next_attempt: str | None = None
    closed_at: float | None = None
    proven: bool | None = None
    proof: Mapping[str, Any] = field(default_factory=dict[str, Any])
    step_resumed: int | None = None
    steps_lost: int | None = None
    seconds_down: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """A fault put in on purpose."""

    name: str
    fault: Fault
    attempt: str | None
    arguments: Mapping[str, Any]
    author: str
    at: float
    epoch: int
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCheckpoint:
    """A committed checkpoint, and what its examination gave: None while it lasts."""

    checkpoint: Checkpoint
    seen_at: float
    verified: bool | None = None
    healthy: bool = False
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether training may go on from it."""
        return self.verified is True and self.healthy


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
    nodes: Mapping[str, Node] = field(default_factory=dict[str, Node])
    checkpoints: Mapping[str, KnownCheckpoint] = field(default_factory=dict[str, KnownCheckpoint])  # by path
    signals: Mapping[str, SignalRaised] = field(default_factory=dict[str, SignalRaised])
    incidents: Mapping[str, Incident] = field(default_factory=dict[str, Incident])
    drills: Mapping[str, Drill] = field(default_factory=dict[str, Drill])
    requests: frozenset[str] = frozenset()
    stop: StopRequested | None = None
    why: str = ""  # of an ended lineage

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
        """The newest allocation."""
        return _last(self.allocations)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be trained."""
        return self.status in ENDED

    @property
    def settled(self) -> bool:
        """Whether the lineage has ended and holds nothing any more: no processes, no nodes, no open intent."""
        return (
            self.ended and not (self.attempt and self.attempt.live) and not (self.allocation and self.allocation.live)
        )


_T = TypeVar("_T")


def _last(mapping: Mapping[str, _T]) -> _T | None:
    return list(mapping.values())[-1] if mapping else None


def ancestry(state: State, run: str) -> list[tuple[str, int | None]]:
    """The runs that `run`'s weights passed through, newest first, each with the last step that counts (None: all)."""
    chain: list[tuple[str, int | None]] = [(run, None)]
    while (start := state.runs[chain[-1][0]].checkpoint) is not None:
        chain.append((start.run, start.step))
    return chain


# ---- numbers ----------------------------------------------------------------------------------------------------

_ID = re.compile(r"(?P<lineage>\d+)(?:\.(?P<run>\d{2,})(?:-a(?P<attempt>\d+))?)?")


def run_name(lineage: str, number: int) -> str:
    """`12`, 1 → `12.01`."""
    return f"{lineage}.{number:02d}"


def attempt_name(run: str, number: int) -> str:
    """`12.01`, 3 → `12.01-a3`."""
    return f"{run}-a{number}"


def attempt_folder(attempt: str) -> str:
    """`12.01-a3` → `12.01/a3`, below the lineage's folder."""
    run, _, number = attempt.partition("-")
    return f"{run}/{number}"


def lineage_of(identifier: str) -> str:
    """The lineage that `12`, `12.01` or `12.01-a3` belongs to.

    Raises:
        ValueError: it is none of these.
    """
    match = _ID.fullmatch(identifier)
    if match is None:
        raise ValueError(f"{identifier!r} is no lineage (12), run (12.01) or attempt (12.01-a3)")
    return match["lineage"]
