"""Events: runs, allocations, attempts and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.values import (
    AllocationStatus,
    Checkpoint,
    DataSince,
    Deduplicated,
    LrFactor,
    Optimizer,
    Outcome,
    PlannedChange,
    RankExit,
    Readback,
    Schedule,
    Skip,
    StackGroup,
)


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
    data: tuple[DataSince, ...] = ()  # what replaces the lineage's data, by step


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationIntended:
    """Intent: ask the scheduler for nodes, once. Settled by `AllocationSubmitted` or `AllocationFailed`."""

    allocation: str
    nodes: int
    exclude: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationSubmitted:
    """Outcome of `AllocationIntended`. `adopted` if an earlier daemon process had submitted it."""

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
    planned: tuple[PlannedChange, ...] = ()
    data: str | None = None  # digest of what it trains on
    dedup: tuple[Deduplicated, ...] = ()  # what was removed from it before
    capabilities: tuple[str, ...] = ()  # what its trainer can do beyond the contract: `members`, `warm_start`, …


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptProgressed:
    """Observation: how far telemetry has come. The first one of an attempt carries its first step.

    The seconds are of the steps since the one before: the median of a step without what a save held it up, and what
    saves and evaluations took in all. The first step of an attempt is in none of them.

    Once ranks were replaced in place, `generation` is that of the newest membership that has made a step, with its
    first steps.
    """

    attempt: str
    first_step: int
    first_step_at: float
    step: int
    at: float
    readbacks: tuple[Readback, ...] = ()
    step_seconds: float | None = None
    save_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    generation: int = 1
    generation_first_step: int | None = None
    generation_first_at: float | None = None
    generation_readbacks: tuple[Readback, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyMetered:
    """Observation: what the GPUs of all held nodes used between two moments, by NVML's counters."""

    since: float
    until: float
    joules: float
    gpus: int


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
    exits: tuple[RankExit, ...]  # the first ones by time, of thousands
    unreachable: tuple[str, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict[str, int])  # how all ranks ended: `code 1` → how many


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsGone:
    """Observation: committed checkpoints of a run that are not there any more: thinned out, or lost."""

    run: str
    paths: tuple[str, ...]
