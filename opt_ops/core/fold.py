"""`fold(state, entry) -> state`: the only way a lineage's state comes about. It decides nothing and reads no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from opt_ops.core import events as e
from opt_ops.core.run import (
    TRANSITIONS,
    Allocation,
    Attempt,
    Drill,
    IllegalTransition,
    Incident,
    KnownCheckpoint,
    Node,
    Run,
    State,
    Status,
)
from opt_ops.core.values import Action, AllocationStatus, Fault

_T = TypeVar("_T")


def fold(state: State, entry: e.Entry) -> State:
    """The state after one more journal entry.

    Raises:
        IllegalTransition: the event cannot follow on this state. The supervisor folds before it writes, so that such an
            event, a fault of ours, never reaches the journal.
    """
    try:
        state = _FOLDS[type(entry.event)](state, entry.event, entry)
    except KeyError as error:
        raise IllegalTransition(f"{e.kind_of(entry.event)} names {error}, which the journal does not know") from error
    return replace(state, seq=entry.seq, epoch=entry.epoch)


def replay(entries: Iterable[e.Entry]) -> State:
    """The state that a whole journal tells."""
    state = State()
    for entry in entries:
        state = fold(state, entry)
    return state


def _move(state: State, status: Status, entry: e.Entry) -> State:
    if status not in TRANSITIONS[state.status]:
        raise IllegalTransition(f"{e.kind_of(entry.event)}: {state.status} → {status} is not allowed")
    return replace(state, status=status, since=entry.ts)


def _put(mapping: Mapping[str, _T], key: str, value: _T) -> dict[str, _T]:
    return {**mapping, key: value}


def _with_attempt(state: State, name: str, **changes: Any) -> State:
    attempt = replace(state.attempts[name], **changes)
    return replace(state, attempts=_put(state.attempts, name, attempt))


def _with_incident(state: State, name: str, **changes: Any) -> State:
    incident = replace(state.incidents[name], **changes)
    return replace(state, incidents=_put(state.incidents, name, incident))


def _with_allocation(state: State, name: str, **changes: Any) -> State:
    allocation = replace(state.allocations[name], **changes)
    return replace(state, allocations=_put(state.allocations, name, allocation))


def _with_node(state: State, name: str, **changes: Any) -> State:
    node = replace(state.nodes.get(name, Node(name=name)), **changes)
    return replace(state, nodes=_put(state.nodes, name, node))


def _heard(state: State, request: str) -> State:
    return replace(state, requests=state.requests | {request})


# ---- the daemon and its operators -------------------------------------------------------------------------------


def _daemon_started(state: State, event: e.DaemonStarted, _: e.Entry) -> State:
    # An open drill that kills the daemon is settled by the next life: it did die.
    drills = {
        name: replace(drill, done=True) if drill.fault is Fault.KILL_DAEMON else drill
        for name, drill in state.drills.items()
    }
    running = state.attempt is not None and state.attempt.live
    return replace(state, blind_seconds=event.blind_seconds if running else None, drills=drills)


def _lineage_started(state: State, event: e.LineageStarted, entry: e.Entry) -> State:
    state = _heard(_move(state, Status.PLANNED, entry), event.request)
    return replace(state, lineage=event, started_at=entry.ts)


def _stop_requested(state: State, event: e.StopRequested, _: e.Entry) -> State:
    return replace(_heard(state, event.request), stop=event)


def _note_added(state: State, event: e.NoteAdded, _: e.Entry) -> State:
    return _heard(state, event.request)


def _request_refused(state: State, event: e.RequestRefused, _: e.Entry) -> State:
    return _heard(state, event.request)


def _drill_requested(state: State, event: e.DrillRequested, entry: e.Entry) -> State:
    drill = Drill(
        name=event.drill,
        fault=event.fault,
        attempt=event.attempt,
        arguments=event.arguments,
        author=event.author,
        at=entry.ts,
        epoch=entry.epoch,
    )
    return replace(_heard(state, event.request), drills=_put(state.drills, event.drill, drill))


def _drill_done(state: State, event: e.DrillDone, _: e.Entry) -> State:
    drill = replace(state.drills[event.drill], done=True)
    return replace(state, drills=_put(state.drills, event.drill, drill))


# ---- runs, allocations, attempts --------------------------------------------------------------------------------


def _run_planned(state: State, event: e.RunPlanned, entry: e.Entry) -> State:
    run = Run(
        name=event.run,
        parent=event.parent,
        cause=event.cause,
        incident=event.incident,
        checkpoint=event.checkpoint,
        lr_factors=event.lr_factors,
        planned_at=entry.ts,
    )
    return replace(state, runs=_put(state.runs, event.run, run))


def _allocation_intended(state: State, event: e.AllocationIntended, entry: e.Entry) -> State:
    allocation = Allocation(
        name=event.allocation,
        wanted=event.nodes,
        exclude=event.exclude,
        intended_at=entry.ts,
        epoch=entry.epoch,
        since=entry.ts,
    )
    state = _move(state, Status.QUEUED, entry)
    return replace(state, allocations=_put(state.allocations, event.allocation, allocation))


def _allocation_submitted(state: State, event: e.AllocationSubmitted, entry: e.Entry) -> State:
    return _with_allocation(state, event.allocation, job=event.job, since=entry.ts)


def _allocation_failed(state: State, event: e.AllocationFailed, entry: e.Entry) -> State:
    return _with_allocation(state, event.allocation, failed=event.why, since=entry.ts)


def _allocation_changed(state: State, event: e.AllocationChanged, entry: e.Entry) -> State:
    changes: dict[str, Any] = {"reason": event.reason}
    if event.status is not AllocationStatus.UNKNOWN:
        changes |= {"status": event.status, "since": entry.ts, "nodes": event.nodes}
    if event.status is AllocationStatus.RUNNING:
        changes["ran"] = True
    state = _with_allocation(state, event.allocation, **changes)
    if event.status is AllocationStatus.RUNNING and state.status is Status.QUEUED:
        return _move(state, Status.PREFLIGHT, entry)
    return state


def _release_intended(state: State, event: e.ReleaseIntended, entry: e.Entry) -> State:
    return _with_allocation(state, event.allocation, release_at=entry.ts)


def _attempt_intended(state: State, event: e.AttemptIntended, entry: e.Entry) -> State:
    attempt = Attempt(
        name=event.attempt,
        run=event.run,
        nodes=event.nodes,
        ranks_per_node=event.ranks_per_node,
        checkpoint=event.checkpoint,
        incident=event.incident,
        intended_at=entry.ts,
    )
    state = _move(state, Status.STARTING, entry)
    state = replace(state, attempts=_put(state.attempts, event.attempt, attempt))
    waiting = [i.name for i in state.incidents.values() if _waits_for_attempt(i)]
    for name in waiting:
        state = _with_incident(state, name, next_attempt=event.attempt)
    return state


def _waits_for_attempt(incident: Incident) -> bool:
    return (
        incident.closed_at is None
        and incident.decision is not None
        and incident.decision.action in (Action.RESTART, Action.ROLLBACK)
    )


def _attempt_started(state: State, event: e.AttemptStarted, _: e.Entry) -> State:
    return _with_attempt(state, event.attempt, started_at=event.at)


def _attempt_configured(state: State, event: e.AttemptConfigured, _: e.Entry) -> State:
    return _with_attempt(
        state,
        event.attempt,
        steps=event.steps,
        schedule=event.schedule,
        optimizer=event.optimizer,
        versions=event.versions,
    )


def _attempt_progressed(state: State, event: e.AttemptProgressed, entry: e.Entry) -> State:
    attempt = state.attempts[event.attempt]
    state = _with_attempt(
        state,
        event.attempt,
        first_step=event.first_step,
        first_step_at=event.first_step_at,
        last_step=event.step,
        last_step_at=event.at,
        readbacks=event.readbacks or attempt.readbacks,
        progress_epoch=entry.epoch,
    )
    return _move(state, Status.TRAINING, entry) if state.status is Status.STARTING else state


def _stop_intended(state: State, event: e.StopIntended, entry: e.Entry) -> State:
    return _with_attempt(state, event.attempt, stop_why=event.why, stop_at=entry.ts, stop_seq=entry.seq)


def _attempt_ended(state: State, event: e.AttemptEnded, entry: e.Entry) -> State:
    return _with_attempt(
        state,
        event.attempt,
        outcome=event.outcome,
        ended_at=entry.ts,
        exits=event.exits,
        last_step=event.last_step,
        last_step_at=event.last_step_at,
    )


def _checkpoint_seen(state: State, event: e.CheckpointSeen, entry: e.Entry) -> State:
    known = KnownCheckpoint(checkpoint=event.checkpoint, seen_at=entry.ts)
    return replace(state, checkpoints=_put(state.checkpoints, event.checkpoint.path, known))


def _checkpoint_verified(state: State, event: e.CheckpointVerified, _: e.Entry) -> State:
    path = event.checkpoint.path
    known = replace(state.checkpoints[path], verified=True, healthy=event.healthy, why=event.why)
    return replace(state, checkpoints=_put(state.checkpoints, path, known))


def _checkpoint_refused(state: State, event: e.CheckpointRefused, _: e.Entry) -> State:
    path = event.checkpoint.path
    known = replace(state.checkpoints[path], verified=False, healthy=False, why=event.why)
    return replace(state, checkpoints=_put(state.checkpoints, path, known))


# ---- what is wrong, what is done --------------------------------------------------------------------------------


def _signal_raised(state: State, event: e.SignalRaised, _: e.Entry) -> State:
    return replace(state, signals=_put(state.signals, event.key, event))


def _node_judged(state: State, event: e.NodeJudged, _: e.Entry) -> State:
    return _with_node(
        state,
        event.node,
        host=event.host,
        verdict=event.verdict,
        reason=event.reason,
        source=event.source,
        at=event.at,
        evidence=event.evidence,
        drill=event.drill,
    )


def _incident_opened(state: State, event: e.IncidentOpened, entry: e.Entry) -> State:
    incident = Incident(
        name=event.incident,
        kind=event.failure,
        cause=event.cause,
        detector=event.detector,
        attempt=event.attempt,
        nodes=event.nodes,
        step_failed=event.step_failed,
        onset_step=event.onset_step,
        at=event.at,
        opened_at=entry.ts,
        opened_epoch=entry.epoch,
        evidence=event.evidence,
        drill=event.drill,
    )
    return replace(state, incidents=_put(state.incidents, event.incident, incident))


def _recovery_decided(state: State, event: e.RecoveryDecided, entry: e.Entry) -> State:
    state = _with_incident(state, event.incident, decision=event, decided_at=entry.ts)
    if event.action is Action.ROLLBACK:
        return _move(state, Status.ROLLING_BACK, entry)
    if event.action is Action.RESTART and state.status is not Status.ROLLING_BACK:
        return _move(state, Status.RECOVERING, entry)
    return state


def _node_excluded(state: State, event: e.NodeExcluded, _: e.Entry) -> State:
    return _with_node(state, event.node, excluded_by=event.incident)


def _drain_intended(state: State, event: e.DrainIntended, _: e.Entry) -> State:
    return _with_node(state, event.node, drain="intended")


def _node_drained(state: State, event: e.NodeDrained, _: e.Entry) -> State:
    return _with_node(state, event.node, drain="done" if event.done else "refused")


def _incident_closed(state: State, event: e.IncidentClosed, entry: e.Entry) -> State:
    return _with_incident(
        state,
        event.incident,
        closed_at=entry.ts,
        proven=event.proven,
        proof=event.proof,
        step_resumed=event.step_resumed,
        steps_lost=event.steps_lost,
        seconds_down=event.seconds_down,
    )


def _lineage_completed(state: State, _: e.LineageCompleted, entry: e.Entry) -> State:
    return _move(state, Status.COMPLETED, entry)


def _lineage_halted(state: State, event: e.LineageHalted, entry: e.Entry) -> State:
    return replace(_move(state, Status.HALTED, entry), why=event.why)


def _lineage_cancelled(state: State, event: e.LineageCancelled, entry: e.Entry) -> State:
    return replace(_move(state, Status.CANCELLED, entry), why=event.why)


_FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.DaemonStarted: _daemon_started,
    e.LineageStarted: _lineage_started,
    e.StopRequested: _stop_requested,
    e.NoteAdded: _note_added,
    e.DrillRequested: _drill_requested,
    e.DrillDone: _drill_done,
    e.RequestRefused: _request_refused,
    e.RunPlanned: _run_planned,
    e.AllocationIntended: _allocation_intended,
    e.AllocationSubmitted: _allocation_submitted,
    e.AllocationFailed: _allocation_failed,
    e.AllocationChanged: _allocation_changed,
    e.ReleaseIntended: _release_intended,
    e.AttemptIntended: _attempt_intended,
    e.AttemptStarted: _attempt_started,
    e.AttemptConfigured: _attempt_configured,
    e.AttemptProgressed: _attempt_progressed,
    e.StopIntended: _stop_intended,
    e.AttemptEnded: _attempt_ended,
    e.CheckpointSeen: _checkpoint_seen,
    e.CheckpointVerified: _checkpoint_verified,
    e.CheckpointRefused: _checkpoint_refused,
    e.SignalRaised: _signal_raised,
    e.NodeJudged: _node_judged,
    e.IncidentOpened: _incident_opened,
    e.RecoveryDecided: _recovery_decided,
    e.NodeExcluded: _node_excluded,
    e.DrainIntended: _drain_intended,
    e.NodeDrained: _node_drained,
    e.IncidentClosed: _incident_closed,
    e.LineageCompleted: _lineage_completed,
    e.LineageHalted: _lineage_halted,
    e.LineageCancelled: _lineage_cancelled,
}
