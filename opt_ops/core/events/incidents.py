"""Events: what is wrong, what is done about it, and who is notified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.failures.causes import Cause, Suspicion
from opt_ops.core.values import Action, Checkpoint, GpuPart, Severity, Skip, Tier, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRaised:
    """Observation: a detector's finding. `step` is where it was seen, `onset_step` where it began.

    A rollback because of it goes back to at least `margin_steps` before the onset. `onset` is what telemetry shows
    around that step (`opt_ops/core/detect/onset.py`); empty where it is no trouble with the loss.
    """

    signal: str
    tier: Tier
    attempt: str
    step: int | None
    onset_step: int | None
    at: float  # when it began, by the evidence's own clock
    nodes: tuple[str, ...] = ()
    rule: str
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    margin_steps: int = 0
    onset: Mapping[str, Any] = field(default_factory=dict[str, Any])
    generation: int = 1  # of the membership of the attempt in which it was found

    @property
    def key(self) -> str:
        """Equal for a finding that is made again, as after a restart of the daemon."""
        newer = f"/{self.generation}" if self.generation > 1 else ""
        return f"{self.signal}/{self.tier}/{self.attempt}/{self.onset_step}{newer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJudged:
    """Observation: a node's verdict, with the reason code and who says so. Written when it changes, or its GPUs do."""

    node: str
    host: str
    verdict: Verdict
    reason: str
    source: str
    at: float
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    drill: str | None = None
    gpus: tuple[GpuPart, ...] = ()  # that the node has, unless they are those that were reported last


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
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    drill: str | None = None
    signal: str | None = None  # the key of the finding behind it
    margin_steps: int = 0  # a rollback goes back to at least so many steps before the onset
    causes: tuple[Suspicion, ...] = ()  # what may be behind it, the likeliest first


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
    nodes: tuple[str, ...] = ()  # of the attempt afterwards, where ranks are replaced in place
    ranks: tuple[int, ...] = ()  # that are replaced in place
    not_in_place: str | None = None  # why they are not, although the playbook would begin with that
    settings: tuple[str, ...] = ()
    skip_batches: int = 0
    save_first: bool = False  # the attempt is healthy: it leaves after one more checkpoint
    advice: bool = False  # a person drives: said, not done
    cause: Cause | None = None  # that the rung is for; None: it is of the general ladder
    skips: tuple[Skip, ...] = ()  # batches of the original order that the next run leaves out
    refuses: Checkpoint | None = None  # from which no attempt begins any more
    takes_back: tuple[str, ...] = ()  # incidents whose change of learning rate and settings is undone: it cured nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterthoughtAdded:
    """Decision: what later steps show about an incident that is over. An incident has one of each topic at most."""

    incident: str
    topic: str
    text: str


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
    """Decision: every step is trained. `why` is a remark: what was not as usual at the end."""

    step: int
    why: str = ""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertIntended:
    """Intent: send an alert. Its outcome is `AlertSettled`; after a crash it is sent again."""

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
