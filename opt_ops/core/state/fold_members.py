"""What the replacement of ranks does to the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.attempts import Members
from opt_ops.core.state.model import State
from opt_ops.core.state.update import with_attempt, with_incident, with_node


def _members_intended(state: State, event: e.MembersIntended, entry: e.Entry) -> State:
    attempt = state.attempts[event.attempt]
    members = Members(
        generation=event.generation,
        nodes=event.nodes,
        before=attempt.nodes,
        new=event.new,
        incident=event.incident,
        intended_at=entry.ts,
    )
    return with_attempt(state, event.attempt, nodes=event.nodes, members=(*attempt.members, members))


def _members_joined(state: State, event: e.MembersJoined, _: e.Entry) -> State:
    changes = {"joined_at": event.at, "step": event.step, "repeated": event.repeated, "kept": event.kept}
    return _with_members(state, event, **changes)


def _members_failed(state: State, event: e.MembersFailed, _: e.Entry) -> State:
    state = _with_members(state, event, failed=event.why)
    members = (m for m in state.attempts[event.attempt].members if m.generation == event.generation)
    incident = event.incident or next((m.incident for m in members), None)
    if incident is None:
        return state
    return with_incident(state, incident, decision=None, decided_at=None, fell_back=event.why)


def _with_members(state: State, event: e.MembersJoined | e.MembersFailed, **changes: Any) -> State:
    known = state.attempts[event.attempt].members
    members = tuple(replace(m, **changes) if m.generation == event.generation else m for m in known)
    return with_attempt(state, event.attempt, members=members)


def _standby_seen(state: State, event: e.StandbySeen, _: e.Entry) -> State:
    return with_node(state, event.node, standby=event.ready)


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.MembersIntended: _members_intended,
    e.MembersJoined: _members_joined,
    e.MembersFailed: _members_failed,
    e.StandbySeen: _standby_seen,
}
