"""Events: starts of daemon processes, and requests of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.values import AskTerms, DataSince, Driver, Fault, LrFactor, Parent, PlannedChange, Shape, Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStarted:
    """Observation: a new daemon process took over this lineage."""

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
    valid: tuple[str, ...] = ()
    shape: Shape
    driver: Driver = Driver.DAEMON
    planned: tuple[PlannedChange, ...] = ()
    init_from: str | None = None  # the checkpoint whose weights training begins with; None: those of the seed
    parent: Parent | None = None  # of a fork: the checkpoint of another lineage that its first run goes on from
    lr_factors: tuple[LrFactor, ...] = ()  # of a fork: those in force at that checkpoint, and its own
    skips: tuple[Skip, ...] = ()  # of a fork: those in force at that checkpoint
    data_since: tuple[DataSince, ...] = ()  # changes of the data planned from the start; of a fork also those before it
    reason: str = ""


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

    `to_step` None: no step is discarded. `lr` is a learning rate to reach at the next step, by a factor on the
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
    keep_later: bool = False  # of a rollback: keep factors, optimizer settings and skips that begin after its step
    planned: tuple[PlannedChange, ...] = ()
    data: tuple[str, ...] = ()  # to train on from there on; empty: as before


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesDeclared:
    """Observation: an operator says what changes on purpose, and from which step on. Nothing is restarted for it."""

    request: str
    author: str
    reason: str
    planned: tuple[PlannedChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverChanged:
    """Observation: an operator takes over, wants to be asked, or hands back."""

    request: str
    author: str
    driver: Driver
    reason: str
    ask: AskTerms | None = None  # how the operator wants to be asked; None: as the playbook pages say


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAllowed:
    """Observation: an operator lets attempts start on a node again. What was held against its parts is forgotten."""

    request: str
    author: str
    node: str
    reason: str
    retested: bool = False  # it passed a test first


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteAdded:
    """Observation: an operator's note about a lineage, run, attempt, incident or log entry. Untrusted text."""

    request: str
    author: str
    target: str
    text: str
    correction: bool = False  # what the logbook says of the target is wrong; this is right


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRequested:
    """Intent: inject a fault. Its outcome is `DrillDone`."""

    request: str
    author: str
    drill: str
    fault: Fault
    attempt: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


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
