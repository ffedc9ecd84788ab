"""The nodes that gave the most trouble, by the ledger of nodes: how often they failed for the time they were used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chronicles.record import LineageRecord
from opt_ops.core.health import lemons
from opt_ops.core.state.model import State

_SHOWN = 10


def worst(record: LineageRecord, incidents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those with failures in the last 28 days of this lineage: lemons first, then those that failed and cost most.

    `opt-ops node ledger` counts alike, over all lineages; a logbook is drawn from the journal of its own.

    Args:
        record: The lineage.
        incidents: Those of its report, for the node-hours that each has cost.
    """
    if record.as_of is None:
        return []
    found = lemons.records(lemons.parts(record.entries), record.as_of)
    gpus = [each for each in found if each.part.kind == "gpu"]
    hours = {row["incident"]: row["node_hours_lost"] or 0.0 for row in incidents}
    rows = [_row(record.state, each, gpus, hours) for each in found if each.part.kind == "node" and each.failures]
    return sorted(rows, key=lambda row: (-row["lemon"], -row["failures"], -row["node_hours_lost"], row["node"]))[
        :_SHOWN
    ]


def _row(
    state: State, node: lemons.Record, gpus: Iterable[lemons.Record], hours: Mapping[str, float]
) -> dict[str, Any]:
    name = node.part.key
    own = [(gpu, number) for gpu in gpus if (number := sum(each.node == name for each in gpu.failures))]
    known = state.nodes.get(name)
    now = "not held" if known is None else "taken out" if known.excluded_by else str(known.verdict)
    return {
        "node": name,
        "failures": len(node.failures),
        "seconds_used": 3600 * node.hours,
        "expected": node.expected,
        "score": node.score,
        "lemon": node.lemon or any(gpu.lemon and gpu.part.node == name for gpu, _ in own),
        "kinds": dict(Counter(each.kind for each in node.failures).most_common()),
        "parts": {gpu.part.serial or gpu.part.key: number for gpu, number in own},
        "node_hours_lost": sum(hours.get(each.incident, 0.0) for each in node.failures),
        "now": now,
        "last": node.failures[-1].incident,
    }
