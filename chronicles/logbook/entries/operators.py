"""The entries of what people asked for, and of the lineage's rests and ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.operators import DRIVES, asked_for, change, halt_cause
from chronicles.record import LineageRecord
from chronicles.wording import duration, full, second, short, whole
from opt_ops.core import events as e
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, Driver

_Found = Iterator[LogEntry]
_Report = Mapping[str, Any]

_TRIED = 8  # incidents that the entry of a halt lists: as many as the page that people got


def told(report: _Report, alert: str) -> list[Fact]:
    """When people were told, if it reached them."""
    at = next((row["settled"] for row in report["alerts"] if row["alert"] == alert and row["delivered"]), None)
    return [Fact(label="Told", text=f"People were told at {second(from_iso(at))}.")] if at else []


def anchored(note: e.NoteAdded) -> str:
    """The anchor of the entry that a note is about, `12-i003` or, of `12-e57`, `e57`; empty if it is about none."""
    match = re.fullmatch(r"(\d+-i\d+)|\d+-(e\d+)", note.target)
    return (match[1] or match[2]) if match else ""


def _note(record: LineageRecord, _: _Report, entry: e.Entry, event: e.NoteAdded) -> _Found:
    state = record.state
    run = state.attempts[event.target].run if event.target in state.attempts else None
    run = event.target if event.target in state.runs else run
    about = "" if event.target in (record.lineage, run) else f" on {short(event.target, 40)}"
    yield entry_of(record, entry, f"note{about}", event.author, run=run, quote=event.text)


def _stop(record: LineageRecord, _: _Report, entry: e.Entry, event: e.StopRequested) -> _Found:
    yield entry_of(record, entry, "stop asked for", event.author, quote=event.reason)


def _pause(record: LineageRecord, _: _Report, entry: e.Entry, event: e.PauseRequested) -> _Found:
    rest = _until(record, entry, e.LineagePaused, e.ResumeRequested)
    nodes = "The nodes are kept meanwhile." if event.keep_nodes else "The nodes are given back."
    if rest is None:
        resumed = _until(record, entry, e.ResumeRequested, e.PauseRequested)
        what = "pause asked for, and taken back before it began" if resumed else "pausing, after one more checkpoint"
        yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(Fact(label="Nodes", text=nodes),))
        return
    attempts = [a for a in record.state.attempts.values() if a.intended_at <= rest.ts]
    where = f" at step {whole(attempts[-1].last_step)}" if attempts else ""
    facts = (Fact(label="Paused", text=f"Since {second(rest.ts)},{where or ' before the first step'}. {nodes}"),)
    yield entry_of(record, entry, "paused", event.author, quote=event.reason, facts=facts)


def _resume(record: LineageRecord, report: _Report, entry: e.Entry, event: e.ResumeRequested) -> _Found:
    halt = next((row for row in report["halts"] if row["answered"] and from_iso(row["answered"]) == entry.ts), None)
    rest = next((ts for ts, status in reversed(record.statuses) if ts < entry.ts and status == "PAUSED"), None)
    launched = _until(record, entry, e.AttemptIntended, e.PauseRequested)
    again = launched.event if launched and isinstance(launched.event, e.AttemptIntended) else None
    facts: list[Fact] = []
    what = "resumed"
    if halt is not None and event.author == halt["answered_by"]:
        what = "resumed after a halt"
        waited = entry.ts - from_iso(halt["at"])
        facts.append(Fact(label="Halted", text=f"For {duration(waited)}. What went before counts no more: {_LOOKED}"))
    elif rest is not None and not _between(record, rest, entry.ts, e.AttemptIntended):
        facts.append(Fact(label="Paused", text=f"For {duration(entry.ts - rest)}."))
    if again is not None:
        step = again.checkpoint.step if again.checkpoint else None
        where = f"From the checkpoint of step {whole(step)}" if step else "From scratch"
        at = second(launched.ts) if launched else ""
        facts.append(Fact(label="Resumed", text=f"{where}, as attempt {again.attempt} at {at}."))
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=tuple(facts))


_LOOKED = "a person has looked, so neither the halt nor the budgets that were spent hold."


def _change(record: LineageRecord, report: _Report, entry: e.Entry, event: e.ChangeRequested) -> _Found:
    if any(asked_for(record, row["evidence"]) == event for row in report["incidents"]):
        return  # the entry of what was done tells it
    fact = Fact(label="Asked for", text=f"{full(change(event))} It has not begun yet.")
    yield entry_of(record, entry, "change asked for", event.author, quote=event.reason, facts=(fact,))


def _driver(record: LineageRecord, _: _Report, entry: e.Entry, event: e.DriverChanged) -> _Found:
    back = event.driver is Driver.DAEMON
    drives = "opt-ops drives again: it acts on what it decides." if back else _WATCHES
    what = DRIVES[event.driver].partition(":")[0]
    yield entry_of(
        record,
        entry,
        what,
        event.author,
        quote=event.reason,
        facts=(Fact(label="Driver", text=full(drives, keep=("opt-ops",))),),
    )


_WATCHES = "A person drives: opt-ops watches, says what it would do, and does only what it is asked to."


def _excluded(record: LineageRecord, _: _Report, entry: e.Entry, event: e.NodeExcluded) -> _Found:
    if event.author is None:
        return  # an incident's entry tells it
    used = [a for a in record.state.attempts.values() if a.intended_at <= entry.ts and event.node in a.nodes]
    busy = bool(used) and (used[-1].ended_at is None or used[-1].ended_at > entry.ts)
    text = "No attempt starts there any more" + ("; the one that runs there goes on." if busy else ".")
    what = f"{short(event.node, 40)} taken out by hand"
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(Fact(label="Node", text=text),))


def _allowed(record: LineageRecord, _: _Report, entry: e.Entry, event: e.NodeAllowed) -> _Found:
    fact = Fact(label="Node", text="Attempts may start there; what was held against its parts is forgotten.")
    what = f"{short(event.node, 40)} allowed again"
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(fact,))


def _halted(record: LineageRecord, report: _Report, entry: e.Entry, event: e.LineageHalted) -> _Found:
    row = next(row for row in report["halts"] if from_iso(row["at"]) == entry.ts)
    facts = [Fact(label="Cause", text=halt_cause(report, row))]
    if event.incident:
        facts.append(Fact(label="Incident", text=event.incident))
    facts.append(Fact(label="Tried", text=_tried(record, report, entry.ts)))
    facts += told(report, row["alert"])
    if row["answered"]:
        by = f"By {row['answered_by']} at {second(from_iso(row['answered']))}"
        facts.append(Fact(label="Answered", text=f"{by}, {duration(from_iso(row['answered']) - entry.ts)} later."))
    need = "was" if row["answered"] else "is"
    yield entry_of(record, entry, f"halted, a human {need} needed", facts=tuple(facts))


def _tried(record: LineageRecord, report: _Report, until: float) -> str:
    """What was done since a person last decided."""
    asked = [x.ts for x in record.entries if isinstance(x.event, (e.ResumeRequested, e.ChangeRequested))]
    since = max((ts for ts in asked if ts < until), default=0.0)
    tried = [
        f"{row['incident']} {row['kind'].replace('_', ' ')}: {row['action']}, {_ending(row)}"
        for row in report["incidents"]
        if since <= from_iso(row["opened"]) <= until and _is_try(row)
    ]
    left_out = f"{len(tried) - _TRIED} before these; " if len(tried) > _TRIED else ""
    return full(left_out + "; ".join(tried[-_TRIED:])) if tried else "Nothing: the first finding ended it."


def _is_try(row: Mapping[str, Any]) -> bool:
    """Whether a playbook did something against a failure."""
    against = row["action"] not in (None, Action.HALT, Action.ADOPT, Action.TELL) and not row["advice"]
    return against and not row["planned"] and row["kind"] != "operator"


def _ending(row: Mapping[str, Any]) -> str:
    if row["closed"] is None:
        return "not over"
    return {True: "proven", False: "NOT PROVEN", None: "left to a person"}[row["proven"]]


def _cancelled(record: LineageRecord, _: _Report, entry: e.Entry, event: e.LineageCancelled) -> _Found:
    yield entry_of(record, entry, "cancelled", facts=(Fact(label="Asked by", text=event.why),))


def _alerted(record: LineageRecord, report: _Report, entry: e.Entry, event: e.AlertSettled) -> _Found:
    alert = record.state.alerts[event.alert]
    if event.delivered:
        if event.alert.startswith(f"{record.lineage}/waiting/"):  # of all others the entry of what it is about tells
            facts = (Fact(label="Cause", text=full(alert.told.body.splitlines()[0])), *told(report, event.alert))
            yield entry_of(record, entry, "waiting for nodes, a human was called", facts=facts)
        return
    facts = (
        Fact(label="Alert", text=full(f"{alert.told.severity}: {alert.told.title}")),
        Fact(label="Cause", text=f"{full(event.why)} It was tried for {duration(entry.ts - alert.at)}, then given up."),
    )
    yield entry_of(record, entry, "people could NOT be told", facts=facts)


def _until(record: LineageRecord, entry: e.Entry, kind: type[e.Event], end: type[e.Event]) -> e.Entry | None:
    """The first entry of a kind after this one, if none of the kind `end` comes before."""
    for later in record.entries:
        if later.seq > entry.seq and isinstance(later.event, (kind, end)):
            return later if isinstance(later.event, kind) else None
    return None


def _between(record: LineageRecord, start: float, end: float, kind: type[e.Event]) -> bool:
    return any(start < entry.ts < end and isinstance(entry.event, kind) for entry in record.entries)


RULES: Mapping[type[e.Event], Callable[[LineageRecord, _Report, e.Entry, Any], _Found]] = {
    e.NoteAdded: _note,
    e.StopRequested: _stop,
    e.PauseRequested: _pause,
    e.ResumeRequested: _resume,
    e.ChangeRequested: _change,
    e.DriverChanged: _driver,
    e.NodeExcluded: _excluded,
    e.NodeAllowed: _allowed,
    e.LineageHalted: _halted,
    e.LineageCancelled: _cancelled,
    e.AlertSettled: _alerted,
}
"""By kind of event: each gives none or one entry."""
