"""The report of a lineage as dataclasses: one class for each object of `report.json`, fields in the order of its keys.

Times are `Moment`, durations are seconds, None is unknown. `encode` writes JSON; a field whose key differs from its
name, or that has none, says so in its metadata. docs/formats.md defines every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chronicles.evaluations import CompletionsReport, ScoreReport
from chronicles.ledger.lemon_nodes import LemonNode
from chronicles.ledger.summary import LedgerSummary
from chronicles.operators import AlertReport, HaltReport, OperatorRequest, PauseReport
from chronicles.record import Moment
from chronicles.report.proposal import ProposalReport
from chronicles.validation import CorpusReport
from opt_ops.core.failures import classes
from opt_ops.core.failures.causes import Cause, Suspicion
from opt_ops.core.names import lineage_of
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver, Fault, Parent, RankExit, Shape, StackGroup, Verdict

_INTERNAL = {"key": ""}  # no field of report.json


@dataclass(frozen=True, slots=True, kw_only=True)
class StacksReport:
    """Where the ranks of a hung attempt were."""

    odd: tuple[int, ...]  # ranks that were not where most ranks were
    silent: tuple[int, ...]  # ranks that did not answer
    nodes: tuple[str, ...]  # of the odd ranks
    groups: tuple[StackGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadbackReport:
    """Settings that the live optimizer used at a step, beside the expected ones."""

    step: int
    lr: float
    expected_lr: float | None  # None: opt-ops does not compute the kind of the schedule
    loss: float | None
    base_lr: float | None = None  # then: what the schedule alone gave, by telemetry
    expected_factor: float | None = None  # and by what it had to be multiplied

    @property
    def due_lr(self) -> float | None:
        """The learning rate that it had to be, however that is known."""
        if self.base_lr is None or self.expected_factor is None:
            return self.expected_lr
        return self.base_lr * self.expected_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterthoughtReport:
    """What later steps showed about an incident that was over."""

    topic: str
    text: str
    at: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """A short run on an idle node that was to tell causes apart, and what it showed."""

    probe: str  # same_data, other_data, lower_lr
    node: str
    spiked: bool | None  # None: it showed nothing in time
    step: int | None  # its newest one
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentReport:
    """An incident: what was found, what was decided, what it cost, and whether the action is proven."""

    incident: str
    kind: str
    cause: str
    detector: str
    drill: str | None
    fault: Fault | None
    nodes: tuple[str, ...]
    attempt: str | None
    at: Moment  # of the first evidence
    opened: Moment
    closed: Moment | None
    evidence: Mapping[str, Any]  # as the detector measured it
    step_failed: int | None  # the newest update at the first evidence
    onset_step: int | None
    last_step: int | None  # of the attempt, where another one followed
    step_resumed: int | None
    steps_discarded: int | None = field(metadata={"key": "steps_lost"})
    seconds_down: float | None
    seconds_to_see: float
    seconds_to_decide: float | None
    seconds_to_relaunch: float | None
    seconds_to_first_step: float | None
    in_place: bool | None  # ranks were replaced while the others kept running; False: all were started again
    generation: int | None  # of the membership with the new ranks
    ranks_replaced: tuple[int, ...]
    pids_kept: bool | None  # whether all other processes are the same as before
    steps_repeated: int | None  # that were made again after a replacement in place
    fell_back: str | None  # why ranks were not replaced in place, where that was to be tried
    what_became: str = field(metadata=_INTERNAL)  # of the lost ranks, in sentences
    action: Action | None
    playbook: str | None  # `loss_spike/v1`
    rung: int | None  # 1 is the first
    why: str | None
    checkpoint_step: int | None
    lr_factor: float | None
    excluded: tuple[str, ...]
    settings: tuple[str, ...]
    skip_batches: int
    save_first: bool
    advisory: bool = field(metadata={"key": "advice"})  # an operator drove: nothing was done
    planned: bool
    answered: bool
    stacks: StacksReport | None
    lr_before: float | None
    lr_after: float | None
    run_before: str | None
    run_after: str | None
    next_attempt: str | None
    proven: bool | None
    proof: Mapping[str, Any]  # as the journal has it
    confidence: str
    confidence_why: str
    causes: tuple[Suspicion, ...]  # the likeliest first
    probes: tuple[ProbeReport, ...]
    proposals: tuple[ProposalReport, ...] = field(metadata=_INTERNAL)
    for_cause: Cause | None  # that the rung is for
    remedy: str | None  # in words of benchmarks: `rollback+skip`; None: nothing was touched
    refused_step: int | None  # of the checkpoint from which nothing begins any more
    afterthoughts: tuple[AfterthoughtReport, ...]
    notified_at: Moment | None = field(metadata={"key": "told"})
    node_hours_lost: float | None
    corrected: bool
    requested: bool = field(metadata=_INTERNAL)  # somebody asked for it: nothing had failed
    opened_entry: str | None = field(metadata=_INTERNAL)  # `12-e57`, as notes name it
    decided_entry: str | None = field(metadata=_INTERNAL)
    decided_checkpoint_step: int | None = field(metadata=_INTERNAL)

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong: neither a planned move nor a request."""
        return not self.planned and not self.requested

    @property
    def cause_in_words(self) -> str:
        """The cause for people. A request has an author and a reason; a code of the health table has words."""
        from opt_ops.core.told.words import without_codes  # here, because commands that only look do without it

        if self.kind == classes.FailureClass.OPERATOR:
            author, _, reason = self.cause.partition(": ")
            return f"asked for by {author}" + (f": “{reason}”" if reason else "")
        return without_codes(self.cause) if self.kind == classes.FailureClass.BAD_GPU else self.cause

    @property
    def documents_command(self) -> str | None:
        """The command that shows the documents on which loss trouble began; None for other incidents."""
        if classes.row(self.kind).domain is not classes.Domain.LOSS or not self.onset or not self.attempt:
            return None
        return f"opt-ops data show {lineage_of(self.attempt)} --step {self.onset} --loss --attempt {self.attempt}"

    @property
    def onset(self) -> int | None:
        """The step at which it began, as far as is known; else the one at which it was seen."""
        return self.onset_step if self.onset_step is not None else self.step_failed

    @property
    def stopped_step(self) -> int | None:
        """The last step before it, as far as is known."""
        return self.last_step if self.last_step is not None else self.step_failed

    @property
    def ends_attempt(self) -> bool:
        """Whether the action ends the attempt for another one, and was also done."""
        return self.action in (Action.RESTART, Action.ROLLBACK, Action.RECONFIGURE) and not self.advisory

    @property
    def stops_training(self) -> bool:
        """Whether training stood still for the action, in place or for another attempt."""
        return self.ends_attempt or (self.action is Action.REPLACE_RANKS and not self.advisory)

    @property
    def interrupts_training(self) -> bool:
        """Whether training stood still for it, or ended."""
        return self.stops_training or (self.action is Action.HALT and not self.advisory)

    @property
    def changes_settings(self) -> bool:
        """Whether it is a rollback or a change of settings, and was also done."""
        return self.action in (Action.ROLLBACK, Action.RECONFIGURE) and not self.advisory

    @property
    def is_spare(self) -> bool:
        """Whether it took out a node on which no rank ran, and nothing else followed."""
        return self.action is Action.EXCLUDE and self.proven is True and not self.advisory

    @property
    def readbacks(self) -> tuple[ReadbackReport, ...]:
        """The proof's updates."""
        return tuple(
            ReadbackReport(
                step=item["step"],
                lr=item["lr"],
                expected_lr=item["expected_lr"],
                loss=item["loss"],
                base_lr=item.get("base_lr"),
                expected_factor=item.get("expected_factor"),
            )
            for item in self.proof.get("readbacks") or ()
        )

    @property
    def telling(self) -> ReadbackReport | None:
        """The first update of the proof whose learning rate is not zero: zero times any factor is zero."""
        return next((each for each in self.readbacks if each.lr), next(iter(self.readbacks), None))

    @property
    def limit_of_proof(self) -> str:
        """What a proof leaves open about the learning rate, in words; empty if the schedule itself is proven."""
        first = self.telling
        if not self.proven or first is None or self.proof.get("schedule_proven", first.expected_lr is not None):
            return ""
        if self.proof.get("factors_proven"):
            return "The schedule is not proven: opt-ops does not compute its kind. The factor on its base_lr is proven."
        return (
            "This proves the step, the optimizer and a finite loss only. The learning rate is not proven: "
            "opt-ops does not compute the kind of the schedule, and telemetry has no base_lr above zero."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A run, and what became of its steps."""

    run: str
    parent: str | None
    cause: str
    incident: str | None
    from_step: int
    lr_factors: tuple[tuple[int, float], ...]  # (from step, factor)
    lr_scale: float  # their product
    settings: tuple[str, ...]
    skips: tuple[tuple[int, int], ...]  # (first, last) batch
    data_changes: tuple[tuple[int, str], ...]  # (after step, what changes)
    planned: Moment
    attempts: tuple[str, ...]
    steps: int
    steps_kept: int
    first_step: int | None
    last_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """An attempt, and how it ended."""

    attempt: str
    run: str
    incident: str | None  # that it recovers from
    nodes: tuple[str, ...]  # of the newest generation of its membership
    ranks_per_node: int
    generation: int
    outcome: str  # an `Outcome`, or `running`
    from_step: int
    first_step: int | None
    last_step: int | None
    started: Moment | None
    ended: Moment | None
    exits: tuple[RankExit, ...]  # the first ones; their times are `Moment`
    ended_by: Mapping[str, int]  # how all ranks ended
    layout: Mapping[str, Any] | None
    versions: Mapping[str, Any] | None
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationReport:
    """An allocation, with the nodes that it holds or held."""

    allocation: str
    job: str | None
    status: str
    wanted: int
    nodes: tuple[str, ...]
    submitted: Moment | None
    started: Moment | None
    ended: Moment | None
    why: str | None
    reason: str | None  # the scheduler's last word


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictReport:
    """A node's verdict, and whether attempts may start on it."""

    node: str
    host: str | None
    verdict: Verdict
    reason: str
    source: str | None
    since: Moment | None
    evidence: Mapping[str, Any]
    drill: str | None
    excluded_by: str | None
    drain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillReport:
    """A drill, and the incident that followed it."""

    drill: str
    fault: Fault
    attempt: str | None
    arguments: Mapping[str, Any]
    author: str
    at: Moment
    done: bool
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteReport:
    """An operator's note."""

    at: Moment
    author: str
    target: str
    text: str
    correction: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReport:
    """An operator's request to stop for good."""

    at: Moment
    author: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """A committed checkpoint, and what its examination found."""

    run: str
    step: int
    verified: bool | None
    healthy: bool
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalReport:
    """How far the journal was read, and what was skipped."""

    seq: int
    epochs: int
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageReport:
    """A lineage in numbers."""

    lineage: str
    recipe: str | None
    settings: tuple[str, ...]
    init_from: str | None  # the checkpoint whose weights training began with; None: those of the seed
    parent: Parent | None  # of a fork: the checkpoint that it began from
    children: tuple[str, ...]  # the lineages that were forked from it
    author: str | None
    shape: Shape | None
    driver: Driver
    paused: PauseReport | None
    size: int | None
    status: Status
    why: str | None
    started: Moment | None
    as_of: Moment | None
    ended: Moment | None
    step: int  # the last kept one
    total_steps: int | None
    incidents: tuple[IncidentReport, ...]
    runs: tuple[RunReport, ...]
    attempts: tuple[AttemptReport, ...]
    allocations: tuple[AllocationReport, ...]
    nodes: tuple[VerdictReport, ...]
    lemon_nodes: tuple[LemonNode, ...] = field(metadata={"key": "worst_nodes"})
    drills: tuple[DrillReport, ...]
    operator_requests: tuple[OperatorRequest, ...] = field(metadata={"key": "operators"})
    halts: tuple[HaltReport, ...]
    alerts: tuple[AlertReport, ...]
    notes: tuple[NoteReport, ...]
    stops: tuple[StopReport, ...]
    checkpoints: tuple[CheckpointReport, ...]
    validation: tuple[CorpusReport, ...]
    evaluations: tuple[ScoreReport, ...]
    completions: tuple[CompletionsReport, ...]
    ledger: LedgerSummary = field(metadata={"key": "goodput"})
    journal: JournalReport
