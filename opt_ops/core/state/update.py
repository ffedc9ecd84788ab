"""How a fold changes a state: one field, one member of a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from opt_ops.core.state.model import Allocation, Incident, Node, State, held_nodes
from opt_ops.core.versions import VersionedSet, Versions

_T = TypeVar("_T")


def with_item(mapping: Mapping[str, _T], key: str, value: _T) -> Versions[_T]:
    """The mapping with one more or another member. It costs the same at any size."""
    versions = mapping if isinstance(mapping, Versions) else Versions(mapping)
    return versions.with_item(key, value)


def with_attempt(state: State, name: str, **changes: Any) -> State:
    """An attempt has changed."""
    attempt = replace(state.attempts[name], **changes)
    return replace(state, attempts=with_item(state.attempts, name, attempt))


def with_incident(state: State, name: str, **changes: Any) -> State:
    """An incident has changed."""
    return with_new_incident(state, replace(state.incidents[name], **changes))


def with_new_incident(state: State, incident: Incident) -> State:
    """An incident is there, or is another one now."""
    name, still = incident.name, state.open_incidents
    if (name in still) is not (incident.closed_at is None):
        still = tuple(each for each in still if each != name) if incident.closed_at is not None else (*still, name)
    return replace(state, incidents=with_item(state.incidents, name, incident), open_incidents=still)


def with_allocation(state: State, name: str, **changes: Any) -> State:
    """An allocation has changed."""
    return with_new_allocation(state, replace(state.allocations[name], **changes))


def with_new_allocation(state: State, allocation: Allocation) -> State:
    """An allocation is there, or is another one now."""
    name, live = allocation.name, state.live
    if (name in live) is not allocation.live:
        live = (*live, name) if allocation.live else tuple(each for each in live if each != name)
    allocations = with_item(state.allocations, name, allocation)
    held = held_nodes(allocations[each] for each in live)
    return replace(state, allocations=allocations, live=live, held=held)


def with_node(state: State, name: str, **changes: Any) -> State:
    """A node has changed, or is heard of for the first time."""
    node = replace(state.nodes.get(name, Node(name=name)), **changes)
    return replace(state, nodes=with_item(state.nodes, name, node))


def with_request_handled(state: State, request: str) -> State:
    """A request was answered."""
    requests = state.requests if isinstance(state.requests, VersionedSet) else VersionedSet(state.requests)
    return replace(state, requests=requests.with_member(request))
