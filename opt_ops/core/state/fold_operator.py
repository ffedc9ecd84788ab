"""How starts of daemon processes and requests of operators change the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.model import Drill, State
from opt_ops.core.state.update import with_item, with_node, with_request_handled
from opt_ops.core.values import AskTerms, Driver, Fault, Status, Verdict


def _daemon_started(state: State, event: e.DaemonStarted, _: e.Entry) -> State:
    # An open drill that kills the daemon is closed by the next daemon process: the daemon did die.
    drills = state.drills
    for name, drill in drills.items():
        if drill.fault is Fault.KILL_DAEMON and not drill.done:
            drills = with_item(drills, name, replace(drill, done=True))
    running = state.attempt is not None and state.attempt.live
    return replace(state, blind_seconds=event.blind_seconds if running else None, drills=drills)


def _lineage_started(state: State, event: e.LineageStarted, entry: e.Entry) -> State:
    state = with_request_handled(state, event.request)
    return replace(state, lineage=event, started_at=entry.ts, driver=event.driver, planned=event.planned)


def _stop_requested(state: State, event: e.StopRequested, _: e.Entry) -> State:
    return replace(with_request_handled(state, event.request), stop=event)


def _pause_requested(state: State, event: e.PauseRequested, _: e.Entry) -> State:
    return replace(with_request_handled(state, event.request), paused=event, resumed=None)


def _resume_requested(state: State, event: e.ResumeRequested, entry: e.Entry) -> State:
    after_halt = state.status is Status.HALTED or state.driver is Driver.OPERATOR
    state = _answered(with_request_handled(state, event.request), entry)
    return replace(state, paused=None, resumed=event, resumed_after_halt=after_halt)


def _change_requested(state: State, event: e.ChangeRequested, entry: e.Entry) -> State:
    state = _answered(with_request_handled(state, event.request), entry)
    changes = with_item(state.changes, event.request, event)
    return replace(state, changes=changes, planned=(*state.planned, *event.planned))


def _changes_declared(state: State, event: e.ChangesDeclared, _: e.Entry) -> State:
    return replace(with_request_handled(state, event.request), planned=(*state.planned, *event.planned))


def _answered(state: State, entry: e.Entry) -> State:
    """A person has looked and decided: what went before neither halts again nor counts against any budget."""
    incidents = state.incidents
    for name in reversed(list(incidents)):
        if incidents[name].answered:
            break  # and so are all before it
        incidents = with_item(incidents, name, replace(incidents[name], answered=True))
    return replace(state, incidents=incidents, why="", asked_at=entry.ts)


def _driver_changed(state: State, event: e.DriverChanged, _: e.Entry) -> State:
    state = with_request_handled(state, event.request)
    return replace(state, driver=event.driver, ask=event.ask or AskTerms())


def _node_allowed(state: State, event: e.NodeAllowed, entry: e.Entry) -> State:
    parts = {uuid: node for uuid, node in state.bad_parts.items() if node != event.node}
    state = replace(with_request_handled(state, event.request), bad_parts=parts)
    return with_node(
        state,
        event.node,
        verdict=Verdict.UNKNOWN,
        reason="allowed_again",
        source=event.author,
        at=entry.ts,
        evidence={},
        excluded_by=None,
        drain=None,
        allowed_at=entry.ts,
    )


def _note_added(state: State, event: e.NoteAdded, _: e.Entry) -> State:
    return with_request_handled(state, event.request)


def _request_refused(state: State, event: e.RequestRefused, _: e.Entry) -> State:
    return with_request_handled(state, event.request)


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
    return replace(with_request_handled(state, event.request), drills=with_item(state.drills, event.drill, drill))


def _drill_done(state: State, event: e.DrillDone, _: e.Entry) -> State:
    drill = replace(state.drills[event.drill], done=True)
    return replace(state, drills=with_item(state.drills, event.drill, drill))


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.DaemonStarted: _daemon_started,
    e.LineageStarted: _lineage_started,
    e.StopRequested: _stop_requested,
    e.PauseRequested: _pause_requested,
    e.ResumeRequested: _resume_requested,
    e.ChangeRequested: _change_requested,
    e.ChangesDeclared: _changes_declared,
    e.DriverChanged: _driver_changed,
    e.NodeAllowed: _node_allowed,
    e.NoteAdded: _note_added,
    e.RequestRefused: _request_refused,
    e.DrillRequested: _drill_requested,
    e.DrillDone: _drill_done,
}
