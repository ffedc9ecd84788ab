"""What an earlier life of the daemon has found of its nodes, by the journal: so that it may come again."""

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
class _Told:
    began: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    lasting: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """What was not seen to end, with the readings that confirm it."""
    xids: list[Xid] = field(default_factory=list[Xid])


def remembered(entries: Iterable[Entry]) -> dict[str, History]:
    """The history that each node begins with, in a life of the daemon that has not heard of it yet.

    The journal has only what decided a verdict. A finding lasts until the node is healthy: what outranks it does not
    end it, and neither does silence.
    """
    told: dict[str, _Told] = {}
    for entry in entries:
        if isinstance(entry.event, NodeJudged):
            _hear(told.setdefault(entry.event.node, _Told()), entry.event)
    return {node: _history(each) for node, each in told.items()}


def _hear(told: _Told, event: NodeJudged) -> None:
    if event.verdict is Verdict.HEALTHY:
        told.lasting.clear()
    evidence = event.evidence
    if "xid" in evidence or "sxid" in evidence:
        told.xids = [*told.xids, _xid(event)][-_XIDS:]
    row = _row_of(event.reason, evidence)
    if row is None:
        return
    key = (key_of(row), _part(evidence))
    if key not in told.lasting:
        told.began[key] = [*told.began.get(key, ()), event.at][-EPISODES:]
    told.lasting[key] = row.readings


def _history(told: _Told) -> History:
    found = {key: Found(told.lasting.get(key, 0), tuple(began)) for key, began in told.began.items()}
    return History(found=found, xids=tuple(told.xids))


def _row_of(reason: str, evidence: Mapping[str, Any]) -> Row | None:
    """Rows may share a reason; then what they ask for tells them apart."""
    rows, verb = _ROWS.get(reason, []), evidence.get("verb")
    return next((row for row in rows if len(rows) == 1 or verb in (str(row.verb), str(row.again))), None)


def _part(evidence: Mapping[str, Any]) -> str:
    index = evidence.get("index")
    name = evidence.get("uuid") or evidence.get("port")
    return str(name) if name else "" if index is None else f"gpu {index}"


def _xid(event: NodeJudged) -> Xid:
    evidence, switch = event.evidence, "sxid" in event.evidence
    return Xid(
        code=int(evidence["sxid" if switch else "xid"]),
        pci=str(evidence.get("pci", "")),
        line=str(evidence.get("line", "")),
        at=event.at,
        drill=event.drill,
        switch=switch,
    )
