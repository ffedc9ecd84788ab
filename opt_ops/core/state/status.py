"""Which status follows an event, and which status may follow which: two tables that `fold` asks once for each event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.values import ENDED, Action, AllocationStatus, Status

__all__ = ["ENDED", "STATUS_AFTER", "TRANSITIONS", "IllegalTransition", "Status", "status_after"]


class IllegalTransition(ValueError):
    """An event that cannot follow: a fault of ours, raised before the event is journaled."""


def status_after(state: State, event: e.Event) -> Status | None:
    """The status that `event` leads to from `state`, which does not know it yet; None: it stays.

    Raises:
        IllegalTransition: that status cannot follow on the present one.
    """
    after = STATUS_AFTER.get(type(event))
    status = after(state, event) if after is not None else None
    if status is not None and (state.status, status) not in TRANSITIONS:
        raise IllegalTransition(f"{e.kind_of(event)}: {state.status} → {status} is not allowed")
    return status


def _always(status: Status) -> Callable[[State, Any], Status | None]:
    def same(_: State, __: Any) -> Status:
        return status

    return same


def _allocation_intended(state: State, _: e.AllocationIntended) -> Status | None:
    live = state.attempt is not None and state.attempt.live
    return None if live else Status.QUEUED  # while an attempt runs, it only replaces what was lost


def _allocation_changed(state: State, event: e.AllocationChanged) -> Status | None:
    runs = event.status is AllocationStatus.RUNNING
    return Status.PREFLIGHT if runs and state.status is Status.QUEUED else None


def _attempt_progressed(state: State, _: e.AttemptProgressed) -> Status | None:
    return Status.TRAINING if state.status is Status.STARTING else None


def _recovery_decided(state: State, event: e.RecoveryDecided) -> Status | None:
    if event.advice or event.save_first:
        return None
    if event.action is Action.ROLLBACK:
        return Status.ROLLING_BACK
    restarts = event.action in (Action.RESTART, Action.REPLACE_RANKS) and state.status is not Status.ROLLING_BACK
    return Status.RECOVERING if restarts else None


def _members_joined(state: State, _: e.MembersJoined) -> Status | None:
    return Status.TRAINING if state.status is Status.RECOVERING else None


def _stop_intended(state: State, event: e.StopIntended) -> Status | None:
    runs = state.status in (Status.STARTING, Status.TRAINING)  # it saved first, and was not in recovery until now
    return Status.RECOVERING if event.incident is not None and runs else None


def _attempt_ended(state: State, _: e.AttemptEnded) -> Status | None:
    recovers = state.status in (Status.RECOVERING, Status.ROLLING_BACK)
    waits = not state.held and any(allocation.pending for allocation in state.live_allocations)
    return Status.QUEUED if recovers and waits else None


def _resume_requested(state: State, _: e.ResumeRequested) -> Status | None:
    if state.status is Status.PAUSED:
        return Status.PREFLIGHT if state.held else Status.QUEUED
    return Status.RECOVERING if state.status is Status.HALTED else None


def _change_requested(state: State, _: e.ChangeRequested) -> Status | None:
    return Status.RECOVERING if state.status is Status.HALTED else None


STATUS_AFTER: Mapping[type[e.Event], Callable[[State, Any], Status | None]] = {
    e.LineageStarted: _always(Status.PLANNED),
    e.AllocationIntended: _allocation_intended,
    e.AllocationChanged: _allocation_changed,
    e.AttemptIntended: _always(Status.STARTING),
    e.AttemptProgressed: _attempt_progressed,
    e.RecoveryDecided: _recovery_decided,
    e.MembersJoined: _members_joined,
    e.StopIntended: _stop_intended,
    e.AttemptEnded: _attempt_ended,
    e.LineagePaused: _always(Status.PAUSED),
    e.ResumeRequested: _resume_requested,
    e.ChangeRequested: _change_requested,
    e.LineageCompleted: _always(Status.COMPLETED),
    e.LineageHalted: _always(Status.HALTED),
    e.LineageCancelled: _always(Status.CANCELLED),
}
"""By event kind. All other kinds leave the status alone."""

TRANSITIONS: Mapping[tuple[Status, Status], str] = {
    (Status.NEW, Status.PLANNED): "the lineage was started",
    (Status.PLANNED, Status.QUEUED): "nodes are asked for",
    (Status.PLANNED, Status.STARTING): "shadow mode: another launcher holds the nodes",
    (Status.PLANNED, Status.PAUSED): "an operator pauses it",
    (Status.PLANNED, Status.CANCELLED): "an operator stops it",
    (Status.QUEUED, Status.QUEUED): "more nodes, or the same again, are asked for",
    (Status.QUEUED, Status.PREFLIGHT): "nodes are held",
    (Status.QUEUED, Status.STARTING): "nodes of an older allocation suffice",
    (Status.QUEUED, Status.ROLLING_BACK): "an operator rolls back while it waits",
    (Status.QUEUED, Status.RECOVERING): "the daemon drives again, and answers an end that it only reported",
    (Status.QUEUED, Status.PAUSED): "an operator pauses it",
    (Status.QUEUED, Status.COMPLETED): "the nodes are gone, and the last checkpoint turns out to be sound",
    (Status.QUEUED, Status.HALTED): "the scheduler refuses to give nodes",
    (Status.QUEUED, Status.CANCELLED): "an operator stops it",
    (Status.PREFLIGHT, Status.QUEUED): "too few of the nodes are fit",
    (Status.PREFLIGHT, Status.STARTING): "enough nodes are fit",
    (Status.PREFLIGHT, Status.ROLLING_BACK): "an operator rolls back before the launch",
    (Status.PREFLIGHT, Status.RECOVERING): "the daemon drives again, and answers an end that it only reported",
    (Status.PREFLIGHT, Status.PAUSED): "an operator pauses it",
    (Status.PREFLIGHT, Status.COMPLETED): "other nodes are held, and the last checkpoint turns out to be sound",
    (Status.PREFLIGHT, Status.HALTED): "no good checkpoint is left to start from",
    (Status.PREFLIGHT, Status.CANCELLED): "an operator stops it",
    (Status.STARTING, Status.TRAINING): "the first step",
    (Status.STARTING, Status.STARTING): "the attempt left for a move before its first step, to nodes that are held",
    (Status.STARTING, Status.QUEUED): "the attempt left for a move, and no node is held",
    (Status.STARTING, Status.ROLLING_BACK): "an operator rolls back before the first step",
    (Status.STARTING, Status.RECOVERING): "the attempt failed before its first step",
    (Status.STARTING, Status.PAUSED): "an operator pauses it",
    (Status.STARTING, Status.COMPLETED): "it was resumed at the last step",
    (Status.STARTING, Status.HALTED): "a playbook ends here",
    (Status.STARTING, Status.CANCELLED): "an operator stops it",
    (Status.TRAINING, Status.QUEUED): "the attempt left for a move, and no node is held",
    (Status.TRAINING, Status.STARTING): "the attempt left for a move to nodes that are held",
    (Status.TRAINING, Status.ROLLING_BACK): "loss trouble, or an operator rolls back",
    (Status.TRAINING, Status.RECOVERING): "the attempt failed, or moves off a node",
    (Status.TRAINING, Status.PAUSED): "an operator pauses it",
    (Status.TRAINING, Status.COMPLETED): "every step is trained",
    (Status.TRAINING, Status.HALTED): "a playbook ends here, or an action did not take effect",
    (Status.TRAINING, Status.CANCELLED): "an operator stops it",
    (Status.ROLLING_BACK, Status.QUEUED): "no node is held for the next run",
    (Status.ROLLING_BACK, Status.STARTING): "the next run starts",
    (Status.ROLLING_BACK, Status.ROLLING_BACK): "a second rollback was decided before the next run starts",
    (Status.ROLLING_BACK, Status.PAUSED): "an operator pauses it",
    (Status.ROLLING_BACK, Status.HALTED): "an earlier action did not take effect",
    (Status.ROLLING_BACK, Status.CANCELLED): "an operator stops it",
    (Status.RECOVERING, Status.QUEUED): "no node is held for the next attempt",
    (Status.RECOVERING, Status.STARTING): "the next attempt starts",
    (Status.RECOVERING, Status.TRAINING): "lost ranks were replaced, and the others kept running",
    (Status.RECOVERING, Status.ROLLING_BACK): "a rollback was decided before the next attempt starts",
    (Status.RECOVERING, Status.RECOVERING): "a second incident",
    (Status.RECOVERING, Status.PAUSED): "an operator pauses it",
    (Status.RECOVERING, Status.COMPLETED): "the last step was made before the stop",
    (Status.RECOVERING, Status.HALTED): "a playbook ends here",
    (Status.RECOVERING, Status.CANCELLED): "an operator stops it",
    (Status.PAUSED, Status.QUEUED): "an operator resumes it; no node is held",
    (Status.PAUSED, Status.COMPLETED): "the last step was made before the pause",
    (Status.PAUSED, Status.PREFLIGHT): "an operator resumes it; nodes are held",
    (Status.PAUSED, Status.ROLLING_BACK): "an operator rolls back; it stays at rest until it is resumed",
    (Status.PAUSED, Status.RECOVERING): "the daemon drives again, and answers an end that it only reported",
    (Status.PAUSED, Status.HALTED): "the daemon drives again, and a playbook ends at what it only reported",
    (Status.PAUSED, Status.CANCELLED): "an operator stops it",
    (Status.HALTED, Status.RECOVERING): "an operator resumes or changes it",
    (Status.HALTED, Status.CANCELLED): "an operator stops it",
}
"""Each edge with the reason for it. COMPLETED and CANCELLED are final."""
