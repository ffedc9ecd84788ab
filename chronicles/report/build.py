"""`report.json`: a lineage in numbers, for other programs. docs/formats.md defines every field."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from chronicles import operators, validation
from chronicles.confidence import confidence
from chronicles.kept_curve import AttemptCurve, kept_points
from chronicles.ledger.lemon_nodes import worst
from chronicles.ledger.summary import account, node_hours_lost
from chronicles.record import LineageRecord
from opt_ops.config import Rates
from opt_ops.core.decide.proof import baseline, under
from opt_ops.core.events import (
    AllocationChanged,
    AllocationFailed,
    AllocationIntended,
    AllocationSubmitted,
    AttemptConfigured,
    Entry,
    NoteAdded,
    StopRequested,
)
from opt_ops.core.schedule import expected_lr
from opt_ops.core.state.model import Attempt, Incident, Run, State
from opt_ops.core.state.queries import lr_scale
from opt_ops.core.text import iso
from opt_ops.core.values import Action, AllocationStatus

SCHEMA = "opt-ops/report/1"


def build(record: LineageRecord, rates: Rates | None = None) -> dict[str, Any]:
    """The whole report as plain JSON values; times are ISO 8601, durations seconds."""
    state, spent = record.state, account(record, rates)
    hours = node_hours_lost(state, spent)
    corrected = {x.event.target for x in record.entries if isinstance(x.event, NoteAdded) and x.event.correction}
    parts = {part.attempt: part for part in record.curves}
    last = max((point.step for _, point in kept_points(record.curves)), default=0)
    steps = next((a.steps for a in reversed(list(state.attempts.values())) if a.steps), None)
    configured = [entry.event for entry in record.entries if isinstance(entry.event, AttemptConfigured)]
    told = operators.told(record)
    layouts = {event.attempt: event.layout for event in configured}
    incidents = [
        _sure(_incident(state, i, parts))
        | {"told": told[i.name], "node_hours_lost": hours[i.name], "corrected": i.name in corrected}
        for i in state.incidents.values()
    ]
    return {
        "schema": SCHEMA,
        "lineage": record.lineage,
        "recipe": state.lineage.recipe if state.lineage else None,
        "settings": list(state.lineage.settings) if state.lineage else [],
        "author": state.lineage.author if state.lineage else None,
        "shape": _shape(state),
        "driver": str(state.driver),
        "paused": operators.paused(record),
        "size": state.wanted_nodes if state.lineage else None,
        "status": str(state.status),
        "why": state.why or None,
        "started": iso(record.started),
        "as_of": iso(record.as_of),
        "ended": iso(record.as_of) if state.ended else None,
        "step": last,
        "total_steps": steps,
        "incidents": incidents,
        "runs": [_run(state, run, parts) for run in state.runs.values()],
        "attempts": [
            _attempt(a, parts[name], layouts.get(name)) | {"jobs": list(record.jobs[name])}
            for name, a in state.attempts.items()
        ],
        "allocations": _allocations(record),
        "nodes": _nodes(state),
        "worst_nodes": worst(record, incidents),
        "drills": _drills(state),
        "operators": operators.operators(record),
        "halts": operators.halts(record),
        "alerts": operators.alerts(record),
        "notes": [_note(entry, entry.event) for entry in record.entries if isinstance(entry.event, NoteAdded)],
        "stops": [_stop(entry, entry.event) for entry in record.entries if isinstance(entry.event, StopRequested)],
        "checkpoints": _checkpoints(state),
        "validation": validation.report(record.curves),
        "goodput": spent,
        "journal": {"seq": state.seq, "epochs": state.epoch, "remarks": list(record.remarks)},
    }


def _incident(state: State, incident: Incident, parts: Mapping[str, AttemptCurve]) -> dict[str, Any]:
    decision, hit = incident.decision, state.attempts.get(incident.attempt or "")
    following = state.attempts.get(incident.next_attempt or "")
    drill = state.drills.get(incident.drill or "")
    checkpoint = decision.checkpoint if decision and decision.action is Action.ROLLBACK else None
    if checkpoint is None and following:
        checkpoint = following.checkpoint
    return {
        "incident": incident.name,
        "kind": incident.kind,
        "cause": incident.cause,
        "detector": incident.detector,
        "drill": incident.drill,
        "fault": str(drill.fault) if drill else None,
        "nodes": list(incident.nodes),
        "attempt": incident.attempt,
        "at": iso(incident.at),
        "opened": iso(incident.opened_at),
        "closed": iso(incident.closed_at),
        "evidence": dict(incident.evidence),
        "step_failed": _step_failed(incident, parts.get(incident.attempt or "")),
        "onset_step": incident.onset_step,
        "last_step": hit.last_step if hit and hit.outcome and following else None,
        "step_resumed": incident.step_resumed,
        "steps_lost": incident.steps_lost,
        "seconds_down": incident.seconds_down,
        **_seconds(incident, following),
        "action": str(decision.action) if decision else None,
        "playbook": f"{decision.playbook}/v{decision.version}" if decision else None,
        "rung": decision.rung + 1 if decision else None,
        "why": decision.why if decision else None,
        "checkpoint_step": checkpoint.step if checkpoint else None,
        "lr_factor": decision.lr_factor if decision else None,
        "excluded": list(decision.exclude) if decision else [],
        "settings": list(decision.settings) if decision else [],
        "skip_batches": decision.skip_batches if decision else 0,
        "save_first": decision.save_first if decision else False,
        "advice": decision.advice if decision else False,
        "planned": operators.is_planned(incident.kind, incident.signal),
        "answered": incident.answered,
        "stacks": _stacks(incident),
        **_learning_rates(state, incident, hit),
        "run_before": hit.run if hit else None,
        "run_after": following.run if following else None,
        "next_attempt": incident.next_attempt,
        "proven": incident.proven,
        "proof": dict(incident.proof),
    }


def _sure(row: dict[str, Any]) -> dict[str, Any]:
    word, why = confidence(row)
    return row | {"confidence": word, "confidence_why": why}


def _stacks(incident: Incident) -> dict[str, Any] | None:
    taken = incident.stacks
    if taken is None:
        return None
    return {
        "odd": list(taken.odd),
        "silent": list(taken.silent),
        "nodes": list(taken.nodes),
        "groups": [{"ranks": list(group.ranks), "frames": list(group.frames)} for group in taken.groups],
    }


def _step_failed(incident: Incident, part: AttemptCurve | None) -> int | None:
    """The newest update at the first evidence. The journal alone lags behind by up to a minute of training."""
    times = [point.ts for point in part.points] if part else []
    seen = bisect_right(times, incident.at)
    by_telemetry = part.points[seen - 1].step if part and seen else None
    return max((step for step in (incident.step_failed, by_telemetry) if step is not None), default=None)


def _seconds(incident: Incident, following: Attempt | None) -> dict[str, float | None]:
    relaunched = following.intended_at if following else None
    return {
        "seconds_to_see": max(0.0, incident.opened_at - incident.at),
        "seconds_to_decide": _between(incident.opened_at, incident.decided_at),
        "seconds_to_relaunch": _between(incident.decided_at, relaunched),
        "seconds_to_first_step": _between(relaunched, following.first_step_at if following else None),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return max(0.0, end - start) if start is not None and end is not None else None


def _learning_rates(state: State, incident: Incident, hit: Attempt | None) -> dict[str, float | None]:
    """At the first proven update: what the run before would have used, and what was read back from the optimizer."""
    known = baseline(state)
    readbacks = incident.proof.get("readbacks") or []
    if known is None or hit is None or not readbacks:
        return {"lr_before": None, "lr_after": None}
    run = state.runs[hit.run]
    schedule, _ = under(*known, run.settings)
    before = expected_lr(schedule, run.lr_factors, readbacks[0]["step"])
    return {"lr_before": before, "lr_after": readbacks[0]["lr"]}


def _run(state: State, run: Run, parts: Mapping[str, AttemptCurve]) -> dict[str, Any]:
    attempts = [attempt for attempt in state.attempts.values() if attempt.run == run.name]
    points = [point for attempt in attempts for point in parts[attempt.name].points]
    kept = sum(parts[attempt.name].is_kept(point) for attempt in attempts for point in parts[attempt.name].points)
    return {
        "run": run.name,
        "parent": run.parent,
        "cause": run.cause,
        "incident": run.incident,
        "from_step": run.checkpoint.step if run.checkpoint else 0,
        "lr_factors": [[factor.step, factor.factor] for factor in run.lr_factors],
        "lr_scale": lr_scale(state, run.name),
        "settings": list(run.settings),
        "skips": [[skip.first, skip.last] for skip in run.skips],
        "planned": iso(run.planned_at),
        "attempts": [attempt.name for attempt in attempts],
        "steps": len(points),
        "steps_kept": kept,
        "first_step": min((point.step for point in points), default=None),
        "last_step": max((point.step for point in points), default=None),
    }


def _attempt(attempt: Attempt, part: AttemptCurve, layout: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "attempt": attempt.name,
        "run": attempt.run,
        "incident": attempt.incident,
        "nodes": list(attempt.nodes),
        "ranks_per_node": attempt.ranks_per_node,
        "outcome": str(attempt.outcome) if attempt.outcome else "running",
        "from_step": attempt.checkpoint.step if attempt.checkpoint else 0,
        "first_step": part.points[0].step if part.points else attempt.first_step,
        "last_step": part.points[-1].step if part.points else attempt.last_step,
        "started": iso(attempt.started_at),
        "ended": iso(attempt.ended_at),
        "exits": [
            {"rank": x.rank, "node": x.node, "code": x.code, "signal": x.signal, "at": iso(x.at)} for x in attempt.exits
        ],
        "ended_by": dict(attempt.ended),
        "layout": dict(layout) if layout is not None else None,
        "versions": dict(attempt.versions) if attempt.versions is not None else None,
    }


def _shape(state: State) -> dict[str, int] | None:
    if state.lineage is None:
        return None
    shape = state.lineage.shape
    return {
        "nodes": shape.nodes,
        "spares": shape.spares,
        "ranks_per_node": shape.ranks_per_node,
        "min_nodes": shape.min_nodes,
    }


def _allocations(record: LineageRecord) -> list[dict[str, Any]]:
    """All of them. An allocation that has ended is told with the nodes that it held."""
    found: dict[str, dict[str, Any]] = {}
    for entry in record.entries:
        match entry.event:
            case AllocationIntended() as event:
                found[event.allocation] = {
                    "allocation": event.allocation,
                    "job": None,
                    "status": "queued",
                    "wanted": event.nodes,
                    "nodes": [],
                    "submitted": None,
                    "started": None,
                    "ended": None,
                    "why": event.why or None,
                    "reason": None,
                }
            case AllocationSubmitted() as event:
                found[event.allocation] |= {"job": event.job, "submitted": iso(entry.ts)}
            case AllocationFailed() as event:
                found[event.allocation] |= {"status": "refused", "ended": iso(entry.ts), "reason": event.why}
            case AllocationChanged() as event if event.status is not AllocationStatus.UNKNOWN:
                row = found[event.allocation]
                row |= {"status": str(event.status), "reason": event.reason or None}
                row["nodes"] = list(event.nodes) or row["nodes"]
                if event.status is AllocationStatus.RUNNING:
                    row["started"] = row["started"] or iso(entry.ts)
                if event.status is AllocationStatus.ENDED:
                    row["ended"] = iso(entry.ts)
            case _:
                pass
    return list(found.values())


def _nodes(state: State) -> list[dict[str, Any]]:
    return [
        {
            "node": node.name,
            "host": node.host or None,
            "verdict": str(node.verdict),
            "reason": node.reason,
            "source": node.source or None,
            "since": iso(node.at) if node.at else None,
            "evidence": dict(node.evidence),
            "drill": node.drill,
            "excluded_by": node.excluded_by,
            "drain": node.drain,
        }
        for node in state.nodes.values()
    ]


def _drills(state: State) -> list[dict[str, Any]]:
    followed = {incident.drill: incident.name for incident in state.incidents.values()}
    return [
        {
            "drill": drill.name,
            "fault": str(drill.fault),
            "attempt": drill.attempt,
            "arguments": dict(drill.arguments),
            "author": drill.author,
            "at": iso(drill.at),
            "done": drill.done,
            "incident": followed.get(drill.name),
        }
        for drill in state.drills.values()
    ]


def _note(entry: Entry, event: NoteAdded) -> dict[str, Any]:
    asked = {"target": event.target, "text": event.text, "correction": event.correction}
    return {"at": iso(entry.ts), "author": event.author, **asked}


def _stop(entry: Entry, event: StopRequested) -> dict[str, Any]:
    return {"at": iso(entry.ts), "author": event.author, "reason": event.reason}


def _checkpoints(state: State) -> list[dict[str, Any]]:
    return [
        {
            "run": known.checkpoint.run,
            "step": known.checkpoint.step,
            "verified": known.verified,
            "healthy": known.healthy,
            "why": known.why or None,
        }
        for known in state.checkpoints.values()
    ]
