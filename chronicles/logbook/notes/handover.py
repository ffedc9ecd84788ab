"""What the next shift must know, as data: `opt-ops logbook handover -o json`, and what the Markdown is written from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from chronicles.logbook.entries.build import entries
from chronicles.logbook.notes.evaluated import newest_evaluation
from chronicles.logbook.notes.happened import Happening, happenings
from chronicles.logbook.notes.pace import ExpectedEnd, Pace, pace
from chronicles.logbook.open_questions import drill_mark, for_operators
from chronicles.logbook.story.build import story
from chronicles.logbook.story.model import Afterthought
from chronicles.record import LineageRecord, Moment
from chronicles.report import encode
from chronicles.report.build import build
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.config import Rates
from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.retry_budget import budgets_left
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.state.status import Status
from opt_ops.core.told import told
from opt_ops.core.values import Driver, Tier, Verdict

_INTERNAL = {"key": ""}  # no field of JSON
_DAY = 24 * 3600.0
_FEW = 2  # actions left of a retry budget: so few are worth a line
_OPEN_STEPS = 100  # as in opt_ops.cli.shared.standing: an alert that came to nothing is over by then
_OPEN_SECONDS = 600.0  # at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What a command knows beyond the journal and the telemetry."""

    now: float
    status: str  # with a question mark where it cannot be trusted
    why: str  # then
    watched: bool | None  # None: it has ended
    watcher: str  # `pid 812 on login2`, if one watches


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimit:
    """A job that reaches its time limit within a day."""

    job: str
    at: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A retry budget with at most two actions left."""

    playbook: str
    kind: str
    left: int
    of: int
    until: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAlert:
    """A finding that triggered no action and may still come to something."""

    signal: str
    step: int | None
    at: Moment
    age_seconds: float
    drill: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A lineage as the next shift must know it. docs/formats.md defines every key."""

    lineage: str
    as_of: Moment
    hours: float
    state: Status
    step: int
    steps: int | None
    data_age_seconds: float | None
    watched: bool | None
    driver: Driver
    expected_end: ExpectedEnd | None
    needs_you: tuple[str, ...]
    time_limits: tuple[TimeLimit, ...]
    spares_held: int
    nodes_asked_for: int
    budgets: tuple[Budget, ...]
    lr_scale: float
    happened: tuple[Happening, ...]
    alerts_open: tuple[OpenAlert, ...]
    suspects: tuple[str, ...]
    afterthoughts: tuple[Afterthought, ...]
    retests: tuple[str, ...]  # nodes that are excluded although nothing is proven against them
    evaluation: str | None  # the newest one of these hours, in words
    pace: Pace | None = field(metadata=_INTERNAL)
    live: Live | None = field(metadata=_INTERNAL)
    report: LineageReport = field(metadata=_INTERNAL)
    record: LineageRecord = field(metadata=_INTERNAL)


def handover(
    record: LineageRecord,
    hours: float = 12.0,
    rates: Rates | None = None,
    live: Live | None = None,
    policy: Policy | None = None,
) -> Handover:
    """Everything for the next shift, about the last `hours`.

    Args:
        record: The lineage.
        hours: How far back it looks.
        rates: The site's figures for the ledger.
        live: What is known beyond the record; None: the note speaks of the record's last moment.
        policy: The site's playbooks, for their retry budgets; None: the note does not tell of budgets.
    """
    report, state = build(record, rates), record.state
    tale = story(record, report, entries(record, report))
    newest = record.as_of or 0.0
    as_of = live.now if live and live.watched and not state.ended else newest
    after = as_of - 3600 * hours
    found = pace(record.curves)
    last = max((curve.points[-1].ts for curve in record.curves if curve.points), default=None)
    trains = state.attempt is not None and state.attempt.live and state.paused is None
    left = (report.total_steps or 0) - report.step
    return Handover(
        lineage=record.lineage,
        as_of=Moment(as_of),
        hours=hours,
        state=report.status,
        step=report.step,
        steps=report.total_steps,
        data_age_seconds=None if last is None else round(max(0.0, (live.now if live else as_of) - last), 3),
        watched=live.watched if live else None,
        driver=report.driver,
        expected_end=found.end(as_of, left) if found and trains and left > 0 else None,
        needs_you=(*_open_proposals(state), *for_operators(report)),
        time_limits=tuple(_time_limits(state, as_of)),
        spares_held=len(_spares(state)),
        nodes_asked_for=sum(each.wanted for each in state.live_allocations if each.pending),
        budgets=tuple(_budgets(state, policy, as_of)) if policy and not state.ended else (),
        lr_scale=report.runs[-1].lr_scale if report.runs else 1.0,
        happened=tuple(happenings(record, tale.entries, after, max(as_of, newest))),
        alerts_open=tuple(_alerts(state, as_of)),
        suspects=tuple(node.node for node in report.nodes if node.verdict == Verdict.SUSPECT and not node.excluded_by),
        afterthoughts=tuple(each for each in tale.afterthoughts if each.at > after),
        retests=tuple(_retests(report)),
        evaluation=newest_evaluation(report.evaluations, after, max(as_of, newest)),
        pace=found,
        live=live,
        report=report,
        record=record,
    )


def row(note: Handover) -> dict[str, Any]:
    """The item of `opt-ops logbook handover -o json`."""
    return encode.encode(note)


def _open_proposals(state: State) -> Iterator[str]:
    """What waits for a person's answer, with the commands."""
    for proposal in open_proposals(state):
        made = proposal.made
        mark = drill_mark(state.incidents[made.incident].drill)
        answer = f"opt-ops run approve {made.incident}, or opt-ops run decline {made.incident}"
        yield f"{mark}opt-ops {told(made)}. Next: {answer}"


def _time_limits(state: State, as_of: float) -> Iterator[TimeLimit]:
    for allocation in state.live_allocations:
        if allocation.ends_at is not None and allocation.ends_at - as_of < _DAY:
            yield TimeLimit(job=allocation.job or allocation.name, at=Moment(allocation.ends_at))


def _spares(state: State) -> set[str]:
    """Nodes that are held, not excluded, and that the attempt does not use."""
    attempt = state.attempt
    used = set(attempt.nodes) if attempt is not None and attempt.live else set[str]()
    return {
        name for name in state.held if name not in used and not (name in state.nodes and state.nodes[name].excluded_by)
    }


def _budgets(state: State, policy: Policy, now: float) -> Iterator[Budget]:
    for each in budgets_left(state, policy, now):
        if each.left <= _FEW:
            yield Budget(playbook=each.playbook, kind=each.kind, left=each.left, of=each.of, until=Moment(each.until))


def _alerts(state: State, as_of: float) -> Iterator[OpenAlert]:
    """Findings of the alert tier in the attempt that runs, until training has gone on for a while."""
    attempt = state.attempt
    if attempt is None or not attempt.live:
        return
    answered = {incident.signal for incident in state.incidents.values()}
    for key, signal in state.signals.items():
        if signal.tier is not Tier.ALERT or signal.attempt != attempt.name or key in answered:
            continue
        near = signal.step is not None and (attempt.last_step or 0) - signal.step <= _OPEN_STEPS
        if near or as_of - signal.at < _OPEN_SECONDS:
            yield OpenAlert(
                signal=signal.signal,
                step=signal.step,
                at=Moment(signal.at),
                age_seconds=max(0.0, as_of - signal.at),
                drill=drill_behind(state, signal),
            )


def _retests(report: LineageReport) -> Iterator[str]:
    """Excluded nodes against which nothing is proven, and which nobody has tested since."""
    rows = {row.incident: row for row in report.incidents}
    for node in report.nodes:
        row = rows.get(node.excluded_by or "")
        if row is not None and _weak(row) and node.verdict is not Verdict.BAD:
            yield node.node


def _weak(row: IncidentReport) -> bool:
    return row.drill is not None or row.confidence == "low"


def paused_soon(note: Handover) -> bool:
    """Whether a pause was requested and has not begun."""
    return note.report.paused is not None and note.state is not Status.PAUSED
