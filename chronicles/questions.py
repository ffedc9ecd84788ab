"""What is still open, and the nodes that gave the most trouble: what the next person on call asks first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chronicles.people import halt_cause
from chronicles.words import count, full, names, short, when, whole
from opt_ops.core.values import Verdict

Row = Mapping[str, Any]

_SHOWN = 10  # of the worst nodes, and of questions of one sort
_OFTEN = 3  # incidents of one class whose cause nobody knows: worth a person's morning


def questions(report: Row) -> list[str]:
    """Sentences of plain text, the most pressing first."""
    return [
        *_halted(report),
        *_capped(_open(report)),
        *_capped(_unproven(report)),
        *_unexplained(report),
        *_capped(_nodes(report)),
        *_capped(_untold(report)),
        *_capped(_asked(report)),
    ]


def _capped(found: Iterator[str]) -> list[str]:
    rows = list(found)
    left = [f"And {count(len(rows) - _SHOWN, 'more')} like these."] if len(rows) > _SHOWN else []
    return [*rows[-_SHOWN:], *left]


def _halted(report: Row) -> Iterator[str]:
    if report["status"] == "HALTED" and report["halts"]:
        yield f"Training is halted. {halt_cause(report, report['halts'][-1])} What should change before it goes on?"


def _open(report: Row) -> Iterator[str]:
    for row in report["incidents"]:
        if row["closed"] is None:
            state = f"decided: {row['action']}, not proven yet" if row["action"] else "nothing is decided yet"
            yield f"{row['incident']} is open since {when(row['opened'])}: {short(row['cause'])}; {state}."


def _unproven(report: Row) -> Iterator[str]:
    for row in report["incidents"]:
        if row["proven"] is False:
            yield f"{row['incident']} was NOT PROVEN: {full(short(str(row['proof'].get('mismatch') or row['cause'])))}"


def _unexplained(report: Row) -> Iterator[str]:
    corrected = {note["target"] for note in report["notes"]}
    low = [row for row in report["incidents"] if row["confidence"] == "low" and row["incident"] not in corrected]
    for kind, number in Counter(row["kind"] for row in low).most_common():
        if number >= _OFTEN:
            last = [row["incident"] for row in low if row["kind"] == kind][-1]
            yield f"{number} incidents of the class {kind.replace('_', ' ')} have no known cause; {last} is the newest."


def _nodes(report: Row) -> Iterator[str]:
    for node in report["nodes"]:
        if node["excluded_by"] and node["verdict"] == Verdict.HEALTHY:
            by = node["excluded_by"]
            yield f"{short(node['node'], 40)} is healthy, and still taken out by {by}. May it come back?"
        elif node["excluded_by"] and node["drain"] == "refused":
            yield f"{short(node['node'], 40)} is taken out here, but the scheduler still gives it to others: no drain."


def _untold(report: Row) -> Iterator[str]:
    for row in report["alerts"]:
        if row["delivered"] is False:
            yield f"An alert reached nobody: {short(row['title'], 80)}. {full(short(row['why'] or 'why is not known'))}"


def _asked(report: Row) -> Iterator[str]:
    """Questions that people wrote down, until somebody writes on the same place again."""
    newest = {note["target"]: note for note in report["notes"]}
    for note in newest.values():
        if note["text"].rstrip().endswith("?"):
            yield f"{short(note['author'], 40)} asks about {note['target']}: {short(note['text'])}"


def worst(report: Row) -> list[dict[str, Any]]:
    """The nodes behind the most lost node-hours, with what they did; drills are not held against them."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in report["incidents"]:
        for node in row["nodes"] if row["drill"] is None and row["kind"] != "operator" else ():
            found[node].append(row)
    known = {row["node"]: row for row in report["nodes"]}
    rows = [_worst(node, incidents, known.get(node)) for node, incidents in found.items()]
    return sorted(rows, key=lambda row: (-row["hours"], -row["incidents"], row["node"]))[:_SHOWN]


def _worst(node: str, incidents: Sequence[Row], known: Row | None) -> dict[str, Any]:
    kinds = Counter(row["kind"].replace("_", " ") for row in incidents)
    parts = [row["evidence"].get("serial") or row["evidence"].get("uuid") for row in incidents]
    return {
        "node": node,
        "incidents": len(incidents),
        "what": names([f"{kind} × {whole(n)}" if n > 1 else kind for kind, n in kinds.most_common()]),
        "parts": names(sorted({str(part) for part in parts if part})) if any(parts) else "–",
        "hours": sum(row["node_hours_lost"] or 0.0 for row in incidents),
        "now": "taken out" if known and known["excluded_by"] else str(known["verdict"]) if known else "not held",
        "last": incidents[-1]["incident"],
    }
