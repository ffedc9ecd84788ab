"""The nodes of a lineage that failed most for the time they were used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chronicles.record import LineageRecord
from opt_ops.core.state.model import State

if TYPE_CHECKING:
    from opt_ops.core.health import lemons

_SHOWN = 10

NOT_HELD, EXCLUDED = "not held", "excluded"
"""Of `LemonNode.now`, as report.json has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LemonNode:
    """A node with failures in the last 28 days of its lineage."""

    node: str
    failures: int
    seconds_used: float
    expected: float  # failures, at the rate of the other nodes
    score: float
    lemon: bool
    kinds: Mapping[str, int]  # failures by class
    parts: Mapping[str, int]  # failures by GPU
    node_hours_lost: float
    now: str  # its verdict, or one of the words above
    last: str  # its newest incident


def lemon_nodes(record: LineageRecord, hours_lost: Mapping[str, float | None]) -> list[LemonNode]:
    """The nodes with failures in the last 28 days: lemons first, then by failures and by cost. At most ten.

    `opt-ops node ledger` counts alike over all lineages; this counts one lineage.

    Args:
        record: The lineage.
        hours_lost: By incident, the node-hours that it has cost.
    """
    from opt_ops.core.health import lemons  # here, because commands that only look do without it

    if record.as_of is None:
        return []
    found = lemons.records(lemons.parts(record.entries), record.as_of)
    gpus = [each for each in found if each.part.kind == "gpu"]
    failed = (each for each in found if each.part.kind == "node" and each.failures)
    nodes = [_node(record.state, each, gpus, hours_lost) for each in failed]
    return sorted(nodes, key=lambda row: (-row.lemon, -row.failures, -row.node_hours_lost, row.node))[:_SHOWN]


def _node(
    state: State, node: lemons.Record, gpus: Iterable[lemons.Record], hours_lost: Mapping[str, float | None]
) -> LemonNode:
    name = node.part.key
    own = [(gpu, number) for gpu in gpus if (number := sum(each.node == name for each in gpu.failures))]
    known = state.nodes.get(name)
    return LemonNode(
        node=name,
        failures=len(node.failures),
        seconds_used=3600 * node.hours,
        expected=node.expected,
        score=node.score,
        lemon=node.lemon or any(gpu.lemon and gpu.part.node == name for gpu, _ in own),
        kinds=dict(Counter(each.kind for each in node.failures).most_common()),
        parts={gpu.part.serial or gpu.part.key: number for gpu, number in own},
        node_hours_lost=sum(hours_lost.get(each.incident) or 0.0 for each in node.failures),
        now=NOT_HELD if known is None else EXCLUDED if known.excluded_by else str(known.verdict),
        last=node.failures[-1].incident,
    )
