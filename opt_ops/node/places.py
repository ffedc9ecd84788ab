"""Who takes part in an attempt, as its orders say: by their membership, or by the launch itself in generation 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opt_ops.contract.membership import Membership


def generation_of(launch: Mapping[str, Any]) -> int:
    """The generation that the orders name."""
    membership = launch["membership"]
    return 1 if membership is None else membership["generation"]


def ranks_of(launch: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Of each rank its node, and its number there."""
    if launch["membership"] is not None:
        return launch["membership"]["ranks"]
    return [(node, local) for node in launch["nodes"] for local in range(launch["ranks_per_node"])]


def places_on(launch: Mapping[str, Any], node: str) -> dict[int, int]:
    """The ranks of a node, by their number there."""
    return {local: rank for rank, (where, local) in enumerate(ranks_of(launch)) if where == node}


def new_in(launch: Mapping[str, Any]) -> frozenset[int]:
    """The ranks that start in this generation."""
    membership = launch["membership"]
    return frozenset(range(len(ranks_of(launch))) if membership is None else membership["new"])


def meeting_of(launch: Mapping[str, Any]) -> tuple[str, int]:
    """Address and port where the ranks meet."""
    where = launch["membership"] or launch
    return where["address"], where["port"]


def membership_for(launch: Mapping[str, Any], local: int, rank: int | None) -> Membership:
    """What the members file of one process says. `rank`: None if it has no place any more."""
    address, port = meeting_of(launch)
    return Membership(
        attempt=launch["attempt"],
        generation=generation_of(launch),
        rank=rank,
        local_rank=local,
        nodes=tuple(node for node, _ in ranks_of(launch)),
        new=tuple(sorted(new_in(launch))),
        address=address,
        port=port,
    )
