"""What the trainer and the supervisor must agree on, so that ranks of a running attempt can be replaced."""

from collections.abc import Sequence

CAPABILITY = "members"
"""In ``capabilities`` of ``config.json``: the trainer's ranks go on in a newer generation of their membership."""


def buddies(nodes: Sequence[str]) -> list[int | None]:
    """For each rank the one that keeps a copy of its state: at the same place of the node half-way round.

    On a single node, it is the rank half-way round. A single rank has none. The supervisor needs the same rule as the
    trainer: a rank whose buddy is lost as well cannot be replaced.

    Args:
        nodes: the node of each rank.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    rows = list(by_node.values())
    if len(nodes) <= 1:
        return [None] * len(nodes)
    if len(rows) == 1:
        return [(rank + len(nodes) // 2) % len(nodes) for rank in range(len(nodes))]
    found: list[int | None] = [None] * len(nodes)
    for index, row in enumerate(rows):
        other = rows[(index + len(rows) // 2) % len(rows)]
        for place, rank in enumerate(row):
            found[rank] = other[place % len(other)]
    return found
