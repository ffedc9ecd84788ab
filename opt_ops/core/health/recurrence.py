"""What earlier daemon processes found about nodes, by the journal, so that a recurrence is recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.events import Entry, NodeJudged
from opt_ops.core.health.findings import GPU_ROWS, NODE_ROWS, PORT_ROWS
from opt_ops.core.health.history import Found, History
from opt_ops.core.health.judge import EPISODES, key_of
from opt_ops.core.health.readings import Xid
from opt_ops.core.health.table import Row
from opt_ops.core.values import Verdict

_XIDS = 32  # of a node

_ROWS: Mapping[str, list[Row]] = {
    reason: [row for row in (*NODE_ROWS, *GPU_ROWS, *PORT_ROWS) if row.reason == reason]
    for reason in {row.reason for row in (*NODE_ROWS, *GPU_ROWS, *PORT_ROWS)}
}


@dataclass
class _Recorded:
    began: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    lasting: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """Findings without a known end, each with the number of readings that confirm it."""
    xids: list[Xid] = field(default_factory=list[Xid])


def remembered(entries: Iterable[Entry]) -> dict[str, History]:
    """Return the history of each node with which a new daemon process begins.

    The journal holds only findings that decided a verdict. A finding lasts until the node is healthy: a finding that
    outranks it does not end it, and silence does not, either.
    """
    recorded: dict[str, _Recorded] = {}
    for entry in entries:
        if isinstance(entry.event, NodeJudged):
            _record(recorded.setdefault(entry.event.node, _Recorded()), entry.event)
    return {node: _history(each) for node, each in recorded.items()}


def _record(recorded: _Recorded, event: NodeJudged) -> None:
    if event.verdict is Verdict.HEALTHY:
        recorded.lasting.clear()
    evidence = event.evidence
    if not evidence.keys().isdisjoint(("xid", "sxid", "event")):
        recorded.xids = [*recorded.xids, _xid(event)][-_XIDS:]
    row = _row_of(event.reason, evidence)
    if row is None:
        return
    key = (key_of(row), _part(evidence))
    if key not in recorded.lasting:
        recorded.began[key] = [*recorded.began.get(key, ()), event.at][-EPISODES:]
    recorded.lasting[key] = row.readings


def _history(recorded: _Recorded) -> History:
    found = {key: Found(recorded.lasting.get(key, 0), tuple(began)) for key, began in recorded.began.items()}
    return History(found=found, xids=tuple(recorded.xids))


def _row_of(reason: str, evidence: Mapping[str, Any]) -> Row | None:
    """Return the row of a reason. If several rows share it, the verb in the evidence selects one."""
    rows, verb = _ROWS.get(reason, []), evidence.get("verb")
    return next((row for row in rows if len(rows) == 1 or verb in (str(row.verb), str(row.again))), None)


def _part(evidence: Mapping[str, Any]) -> str:
    index = evidence.get("index")
    name = evidence.get("uuid") or evidence.get("port")
    return str(name) if name else "" if index is None else f"gpu {index}"


def _xid(event: NodeJudged) -> Xid:
    evidence, switch = event.evidence, "sxid" in event.evidence
    return Xid(
        code=int(evidence.get("sxid" if switch else "xid", 0)),
        kind=str(evidence.get("event", "")),
        pci=str(evidence.get("pci", "")),
        line=str(evidence.get("line", "")),
        at=event.at,
        drill=event.drill,
        switch=switch,
    )
