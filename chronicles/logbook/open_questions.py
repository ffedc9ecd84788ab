"""What is still open: what the next person on call asks first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from chronicles.operators import halt_cause
from chronicles.wording import count, duration, full, short, when
from opt_ops.core.values import Verdict

Row = Mapping[str, Any]

_SHOWN = 10  # questions of one sort
_OFTEN = 3  # incidents of one class whose cause nobody knows: worth a person's morning


def questions(report: Row) -> list[str]:
    """Sentences of plain text, the most pressing first."""
    return [
        *_halted(report),
        *_capped(_open(report)),
        *_capped(_unproven(report)),
        *_unexplained(report),
        *_capped(_lemons(report)),
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


def _lemons(report: Row) -> Iterator[str]:
    for row in report["worst_nodes"]:
        if row["lemon"] and row["now"] != "not held":
            often = f"failed {count(row['failures'], 'time')} in {duration(row['seconds_used'])} of use"
            yield f"{short(row['node'], 40)} {often}, more than chance explains. Should it be replaced?"


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
