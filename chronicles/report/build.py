"""Builds the report of a lineage from its record: the object behind `report.json`, the logbook and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chronicles.evaluations import completions, scores
from chronicles.kept_curve import AttemptCurve, kept_points
from chronicles.ledger.lemon_nodes import lemon_nodes
from chronicles.ledger.summary import summarize
from chronicles.operators import alerts, halts, operator_requests, pause_in_force
from chronicles.record import LineageRecord, Moment, moment
from chronicles.report.incident import incidents
from chronicles.report.model import (
    AllocationReport,
    AttemptReport,
    CheckpointReport,
    DrillReport,
    JournalReport,
    LineageReport,
    NoteReport,
    RunReport,
    StopReport,
    VerdictReport,
)
from chronicles.validation import corpus_reports
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.state.attempts import Attempt, Run
from opt_ops.core.state.data import changes_of
from opt_ops.core.state.model import Node, State
from opt_ops.core.state.queries import lr_scale, total_steps
from opt_ops.core.values import AllocationStatus


def build(record: LineageRecord, rates: Rates | None = None, *, lemons: bool = True) -> LineageReport:
    """The report of a lineage.

    Args:
        record: What is known of it.
        rates: The site's figures for the ledger.
        lemons: Also find the worst nodes: most of the time, which `opt-ops run explain` does not take.
    """
    state, ledger = record.state, summarize(record, rates)
    known = incidents(record, ledger)
    curves = {curve.attempt: curve for curve in record.curves}
    return LineageReport(
        lineage=record.lineage,
        recipe=state.lineage.recipe if state.lineage else None,
        settings=state.lineage.settings if state.lineage else (),
        init_from=state.lineage.init_from if state.lineage else None,
        parent=state.lineage.parent if state.lineage else None,
        children=tuple(record.children),
        author=state.lineage.author if state.lineage else None,
        shape=state.lineage.shape if state.lineage else None,
        driver=state.driver,
        paused=pause_in_force(record),
        size=state.wanted_nodes if state.lineage else None,
        status=state.status,
        why=state.why or None,
        started=moment(record.started),
        as_of=moment(record.as_of),
        ended=moment(record.as_of) if state.ended else None,
        step=max((point.step for _, point in kept_points(record.curves)), default=0),
        total_steps=total_steps(state),
        incidents=known,
        runs=tuple(_run(state, run, curves) for run in state.runs.values()),
        attempts=_attempts(record, curves),
        allocations=_allocations(record),
        nodes=tuple(map(_node, state.nodes.values())),
        lemon_nodes=tuple(lemon_nodes(record, {each.incident: each.node_hours_lost for each in known}))
        if lemons
        else (),
        drills=_drills(state),
        operator_requests=tuple(operator_requests(record)),
        halts=tuple(halts(record)),
        alerts=tuple(alerts(record)),
        notes=_notes(record),
        stops=_stops(record),
        checkpoints=_checkpoints(state),
        validation=tuple(corpus_reports(record.curves)),
        evaluations=scores(record),
        completions=completions(record),
        ledger=ledger,
        journal=JournalReport(seq=state.seq, epochs=state.epoch, remarks=tuple(record.remarks)),
    )


def _run(state: State, run: Run, curves: Mapping[str, AttemptCurve]) -> RunReport:
    attempts = [attempt.name for attempt in state.attempts.values() if attempt.run == run.name]
    steps = [point.step for attempt in attempts for point in curves[attempt].points]
    return RunReport(
        run=run.name,
        parent=run.parent,
        cause=run.cause,
        incident=run.incident,
        from_step=run.checkpoint.step if run.checkpoint else 0,
        lr_factors=tuple((factor.step, factor.factor) for factor in run.lr_factors),
        lr_scale=lr_scale(state, run.name),
        settings=run.settings,
        skips=tuple((skip.first, skip.last) for skip in run.skips),
        data_changes=tuple(changes_of(state, run)),
        planned=Moment(run.planned_at),
        attempts=tuple(attempts),
        steps=len(steps),
        steps_kept=sum(curves[attempt].is_kept(point) for attempt in attempts for point in curves[attempt].points),
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
    )


def _attempts(record: LineageRecord, curves: Mapping[str, AttemptCurve]) -> tuple[AttemptReport, ...]:
    configured = [entry.event for entry in record.entries if isinstance(entry.event, e.AttemptConfigured)]
    layouts = {event.attempt: event.layout for event in configured}
    return tuple(
        _attempt(attempt, curves[name], layouts.get(name), tuple(record.jobs[name]))
        for name, attempt in record.state.attempts.items()
    )


def _attempt(
    attempt: Attempt, curve: AttemptCurve, layout: Mapping[str, Any] | None, jobs: tuple[str, ...]
) -> AttemptReport:
    return AttemptReport(
        attempt=attempt.name,
        run=attempt.run,
        incident=attempt.incident,
        nodes=attempt.nodes,
        ranks_per_node=attempt.ranks_per_node,
        generation=attempt.generation,
        outcome=str(attempt.outcome) if attempt.outcome else "running",
        from_step=attempt.checkpoint.step if attempt.checkpoint else 0,
        first_step=curve.points[0].step if curve.points else attempt.first_step,
        last_step=curve.points[-1].step if curve.points else attempt.last_step,
        started=moment(attempt.started_at),
        ended=moment(attempt.ended_at),
        exits=tuple(replace(each, at=Moment(each.at)) for each in attempt.exits),
        ended_by=attempt.ended,
        layout=layout,
        versions=attempt.versions,
        jobs=jobs,
    )


def _allocations(record: LineageRecord) -> tuple[AllocationReport, ...]:
    found: dict[str, AllocationReport] = {}
    for entry in record.entries:
        match entry.event:
            case e.AllocationIntended() as event:
                found[event.allocation] = AllocationReport(
                    allocation=event.allocation,
                    job=None,
                    status="queued",
                    wanted=event.nodes,
                    nodes=(),
                    submitted=None,
                    started=None,
                    ended=None,
                    why=event.why or None,
                    reason=None,
                )
            case e.AllocationSubmitted() as event:
                known = found[event.allocation]
                found[event.allocation] = replace(known, job=event.job, submitted=Moment(entry.ts))
            case e.AllocationFailed() as event:
                known = found[event.allocation]
                found[event.allocation] = replace(known, status="refused", ended=Moment(entry.ts), reason=event.why)
            case e.AllocationChanged() as event if event.status is not AllocationStatus.UNKNOWN:
                found[event.allocation] = _changed(found[event.allocation], event, Moment(entry.ts))
            case _:
                pass
    return tuple(found.values())


def _changed(known: AllocationReport, event: e.AllocationChanged, at: Moment) -> AllocationReport:
    running, ended = event.status is AllocationStatus.RUNNING, event.status is AllocationStatus.ENDED
    return replace(
        known,
        status=str(event.status),
        nodes=event.nodes or known.nodes,
        reason=event.reason or None,
        started=known.started or at if running else known.started,
        ended=at if ended else known.ended,
    )


def _node(node: Node) -> VerdictReport:
    return VerdictReport(
        node=node.name,
        host=node.host or None,
        verdict=node.verdict,
        reason=node.reason,
        source=node.source or None,
        since=Moment(node.at) if node.at else None,
        evidence=node.evidence,
        drill=node.drill,
        excluded_by=node.excluded_by,
        drain=node.drain,
    )


def _drills(state: State) -> tuple[DrillReport, ...]:
    followed = {incident.drill: incident.name for incident in state.incidents.values()}
    return tuple(
        DrillReport(
            drill=drill.name,
            fault=drill.fault,
            attempt=drill.attempt,
            arguments=drill.arguments,
            author=drill.author,
            at=Moment(drill.at),
            done=drill.done,
            incident=followed.get(drill.name),
        )
        for drill in state.drills.values()
    )


def _notes(record: LineageRecord) -> tuple[NoteReport, ...]:
    return tuple(
        NoteReport(
            at=Moment(entry.ts), author=note.author, target=note.target, text=note.text, correction=note.correction
        )
        for entry in record.entries
        if isinstance(note := entry.event, e.NoteAdded)
    )


def _stops(record: LineageRecord) -> tuple[StopReport, ...]:
    return tuple(
        StopReport(at=Moment(entry.ts), author=stop.author, reason=stop.reason)
        for entry in record.entries
        if isinstance(stop := entry.event, e.StopRequested)
    )


def _checkpoints(state: State) -> tuple[CheckpointReport, ...]:
    return tuple(
        CheckpointReport(
            run=known.checkpoint.run,
            step=known.checkpoint.step,
            verified=known.verified,
            healthy=known.healthy,
            why=known.why or None,
        )
        for known in state.checkpoints.values()
    )
