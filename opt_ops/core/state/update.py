"""How a fold changes a state: one field, one member of a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from opt_ops.core.state.model import Node, State, held_nodes

_T = TypeVar("_T")


def with_item(mapping: Mapping[str, _T], key: str, value: _T) -> dict[str, _T]:
    """A copy with one more or another member."""
    return {**mapping, key: value}


def with_attempt(state: State, name: str, **changes: Any) -> State:
    """An attempt has changed."""
    attempt = replace(state.attempts[name], **changes)
    return replace(state, attempts=with_item(state.attempts, name, attempt))


def with_incident(state: State, name: str, **changes: Any) -> State:
    """An incident has changed."""
    incident = replace(state.incidents[name], **changes)
    return replace(state, incidents=with_item(state.incidents, name, incident))


def with_allocation(state: State, name: str, **changes: Any) -> State:
    """An allocation has changed."""
    allocation = replace(state.allocations[name], **changes)
    allocations = with_item(state.allocations, name, allocation)
    return replace(state, allocations=allocations, held=held_nodes(allocations))


def with_node(state: State, name: str, **changes: Any) -> State:
    """A node has changed, or is heard of for the first time."""
    node = replace(state.nodes.get(name, Node(name=name)), **changes)
    return replace(state, nodes=with_item(state.nodes, name, node))


def with_request_handled(state: State, request: str) -> State:
    """A request was answered."""
    return replace(state, requests=state.requests | {request})
