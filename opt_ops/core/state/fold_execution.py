"""What runs, allocations, attempts and checkpoints do to the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.attempts import Attempt, Members, Run
from opt_ops.core.state.checkpoints import KnownCheckpoint
from opt_ops.core.state.model import Allocation, State
from opt_ops.core.state.queries import waiting_for_attempt
from opt_ops.core.state.update import with_allocation, with_attempt, with_incident, with_item, with_new_allocation
from opt_ops.core.values import HOLDING, AllocationStatus, PlannedChange


def _run_planned(state: State, event: e.RunPlanned, entry: e.Entry) -> State:
    run = Run(
        name=event.run,
        parent=event.parent,
        cause=event.cause,
        incident=event.incident,
        checkpoint=event.checkpoint,
        lr_factors=event.lr_factors,
        planned_at=entry.ts,
        settings=event.settings,
        skips=event.skips,
        data=event.data,
    )
    return replace(state, runs=with_item(state.runs, event.run, run))


def _allocation_intended(state: State, event: e.AllocationIntended, entry: e.Entry) -> State:
    allocation = Allocation(
        name=event.allocation,
        wanted=event.nodes,
        exclude=event.exclude,
        intended_at=entry.ts,
        epoch=entry.epoch,
        since=entry.ts,
    )
    return with_new_allocation(state, allocation)


def _allocation_submitted(state: State, event: e.AllocationSubmitted, entry: e.Entry) -> State:
    return with_allocation(state, event.allocation, job=event.job, since=entry.ts)


def _allocation_failed(state: State, event: e.AllocationFailed, entry: e.Entry) -> State:
    return with_allocation(state, event.allocation, failed=event.why, since=entry.ts)


def _allocation_changed(state: State, event: e.AllocationChanged, entry: e.Entry) -> State:
    allocation = state.allocations[event.allocation]
    changes: dict[str, Any] = {"reason": event.reason}
    if event.status is AllocationStatus.UNKNOWN:
        changes["unknown_since"] = entry.ts if allocation.unknown_since is None else allocation.unknown_since
    else:
        changes["unknown_since"] = None
        changes |= {"status": event.status, "nodes": event.nodes, "ends_at": event.ends_at}
        if event.status is not allocation.status:
            changes["since"] = entry.ts
    if event.status in HOLDING:
        changes["ran"] = True
    return with_allocation(state, event.allocation, **changes)


def _release_intended(state: State, event: e.ReleaseIntended, entry: e.Entry) -> State:
    return with_allocation(state, event.allocation, release_at=entry.ts)


def _stray_found(state: State, event: e.StrayFound, _: e.Entry) -> State:
    return replace(state, orphan_jobs=with_item(state.orphan_jobs, event.job, event.allocation))


def _stray_cancelled(state: State, event: e.StrayCancelled, _: e.Entry) -> State:
    return replace(state, orphan_jobs={job: name for job, name in state.orphan_jobs.items() if job != event.job})


def _size_decided(state: State, event: e.SizeDecided, _: e.Entry) -> State:
    return replace(state, size=event.nodes)


def _lineage_paused(state: State, event: e.LineagePaused, _: e.Entry) -> State:
    return replace(state, why=event.why)


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
    if state.resumed is not None and state.resumed_after_halt:
        start = event.checkpoint.step if event.checkpoint else 0
        goes_on = PlannedChange(step=start + 1, what="resumed", by=state.resumed.author)
        state = replace(state, planned=(*state.planned, goes_on))
    state = replace(state, resumed=None, why="", attempts=with_item(state.attempts, event.attempt, attempt))
    for incident in waiting_for_attempt(state):
        state = with_incident(state, incident.name, next_attempt=event.attempt)
    return state


def _attempt_started(state: State, event: e.AttemptStarted, _: e.Entry) -> State:
    return with_attempt(state, event.attempt, started_at=event.at)


def _attempt_configured(state: State, event: e.AttemptConfigured, _: e.Entry) -> State:
    return with_attempt(
        state,
        event.attempt,
        steps=event.steps,
        schedule=event.schedule,
        optimizer=event.optimizer,
        versions=event.versions,
        planned=event.planned,
        data=event.data,
        capabilities=event.capabilities,
    )


def _attempt_progressed(state: State, event: e.AttemptProgressed, entry: e.Entry) -> State:
    attempt = state.attempts[event.attempt]
    return with_attempt(
        state,
        event.attempt,
        members=_progressed(attempt, event),
        first_step=event.first_step,
        first_step_at=event.first_step_at,
        last_step=event.step,
        last_step_at=event.at,
        readbacks=event.readbacks or attempt.readbacks,
        progress_epoch=entry.epoch,
    )


def _progressed(attempt: Attempt, event: e.AttemptProgressed) -> tuple[Members, ...]:
    """The replacements of ranks, with the first steps of the newest one that has made any."""
    if event.generation_first_step is None:
        return attempt.members
    first = {"first_step": event.generation_first_step, "first_step_at": event.generation_first_at}
    return tuple(
        replace(m, **first, readbacks=event.generation_readbacks or m.readbacks)
        if m.generation == event.generation
        else m
        for m in attempt.members
    )


def _energy_metered(state: State, _: e.EnergyMetered, __: e.Entry) -> State:
    return state  # the ledger's: nothing is decided by it


def _leave_intended(state: State, event: e.LeaveIntended, entry: e.Entry) -> State:
    reached = state.attempts[event.attempt].last_step
    return with_attempt(
        state, event.attempt, leave_why=event.why, leave_at=entry.ts, leave_seq=entry.seq, leave_step=reached
    )


def _stop_intended(state: State, event: e.StopIntended, entry: e.Entry) -> State:
    return with_attempt(state, event.attempt, stop_why=event.why, stop_at=entry.ts, stop_seq=entry.seq)


def _attempt_ended(state: State, event: e.AttemptEnded, entry: e.Entry) -> State:
    return with_attempt(
        state,
        event.attempt,
        outcome=event.outcome,
        ended_at=entry.ts,
        exits=event.exits,
        ended=event.ended,
        last_step=event.last_step,
        last_step_at=event.last_step_at,
    )


def _checkpoint_seen(state: State, event: e.CheckpointSeen, entry: e.Entry) -> State:
    known = KnownCheckpoint(checkpoint=event.checkpoint, seen_at=entry.ts)
    return replace(state, checkpoints=with_item(state.checkpoints, event.checkpoint.path, known))


def _checkpoint_verified(state: State, event: e.CheckpointVerified, _: e.Entry) -> State:
    path = event.checkpoint.path
    known = replace(state.checkpoints[path], verified=True, healthy=event.healthy, why=event.why)
    return replace(state, checkpoints=with_item(state.checkpoints, path, known))


def _checkpoint_refused(state: State, event: e.CheckpointRefused, entry: e.Entry) -> State:
    path = event.checkpoint.path  # the trainer may refuse one that is gone by now
    before = state.checkpoints.get(path) or KnownCheckpoint(checkpoint=event.checkpoint, seen_at=entry.ts)
    known = replace(before, verified=False, healthy=False, why=event.why)
    return replace(state, checkpoints=with_item(state.checkpoints, path, known))


def _checkpoints_gone(state: State, event: e.CheckpointsGone, _: e.Entry) -> State:
    gone = frozenset(event.paths)
    return replace(state, checkpoints={path: known for path, known in state.checkpoints.items() if path not in gone})


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.RunPlanned: _run_planned,
    e.AllocationIntended: _allocation_intended,
    e.AllocationSubmitted: _allocation_submitted,
    e.AllocationFailed: _allocation_failed,
    e.AllocationChanged: _allocation_changed,
    e.ReleaseIntended: _release_intended,
    e.StrayFound: _stray_found,
    e.StrayCancelled: _stray_cancelled,
    e.SizeDecided: _size_decided,
    e.LineagePaused: _lineage_paused,
    e.AttemptIntended: _attempt_intended,
    e.AttemptStarted: _attempt_started,
    e.AttemptConfigured: _attempt_configured,
    e.AttemptProgressed: _attempt_progressed,
    e.EnergyMetered: _energy_metered,
    e.LeaveIntended: _leave_intended,
    e.StopIntended: _stop_intended,
    e.AttemptEnded: _attempt_ended,
    e.CheckpointSeen: _checkpoint_seen,
    e.CheckpointVerified: _checkpoint_verified,
    e.CheckpointRefused: _checkpoint_refused,
    e.CheckpointsGone: _checkpoints_gone,
}
