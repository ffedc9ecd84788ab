"""Entries of operators' requests, and of the lineage's pauses, halts and end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.operators import DRIVES, HaltReport, change, declared, request_behind
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, duration, full, second, short, uncapitalized, whole
from opt_ops.core import events as e
from opt_ops.core.failures.classes import title
from opt_ops.core.names import AlertTopic, parse_alert_id
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver

_Found = Iterator[LogEntry]

_TRIED = 8  # incidents that the entry of a halt lists: as many as the page to on-call


def notified(report: LineageReport, alert: str) -> list[Fact]:
    """When on-call was notified, if the alert was delivered."""
    known = (each for each in report.alerts if each.alert == alert and each.delivered)
    at = next((each.settled for each in known), None)
    return [] if at is None else [Fact(label="Notified", text=f"On-call was notified at {second(at)}.")]


def anchor(note: e.NoteAdded) -> str:
    """The anchor of the entry that a note is about, `12-i003` or, of `12-e57`, `e57`; empty if it is about none."""
    match = re.fullmatch(r"(\d+-i\d+)|\d+-(e\d+)", note.target)
    return (match[1] or match[2]) if match else ""


def halt_cause(report: LineageReport, halt: HaltReport) -> str:
    """Why the lineage halted: the incident, and why its playbook tries nothing more."""
    row = next((row for row in report.incidents if row.incident == halt.incident), None)
    if row is None or row.action != Action.HALT or row.playbook is None:
        return full(halt.why)
    playbook = row.playbook.partition("/")[0]
    why = row.why or ""
    ends = f"Playbook {full(why, keep=(playbook,))}" if why.startswith(playbook) else full(why)  # as older ones said it
    return f"{full(row.cause, keep=row.nodes)} {ends}"


def _note(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.NoteAdded) -> _Found:
    state = record.state
    run = state.attempts[event.target].run if event.target in state.attempts else None
    run = event.target if event.target in state.runs else run
    about = "" if event.target in (record.lineage, run) else f" on {short(event.target, 40)}"
    yield entry_of(record, entry, f"note{about}", event.author, run=run, quote=event.text, notable=True)


def _stop(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.StopRequested) -> _Found:
    yield entry_of(record, entry, "stop requested", event.author, quote=event.reason)


def _pause(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.PauseRequested) -> _Found:
    pause = _next(record, entry, e.LineagePaused, e.ResumeRequested)
    nodes = f"The nodes are {'kept' if event.keep_nodes else 'released'}."
    if pause is None:
        resumed = _next(record, entry, e.ResumeRequested, e.PauseRequested)
        what = "pause requested, and withdrawn before it began" if resumed else "pausing after one more checkpoint"
        yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(Fact(label="Nodes", text=nodes),))
        return
    attempts = [a for a in record.state.attempts.values() if a.intended_at <= pause.ts]
    where = f"at step {whole(attempts[-1].last_step)}" if attempts else "before the first step"
    facts = (Fact(label="Paused", text=f"Since {second(pause.ts)}, {where}. {nodes}"),)
    yield entry_of(record, entry, "paused", event.author, quote=event.reason, facts=facts, notable=True)


def _resume(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.ResumeRequested) -> _Found:
    halt = next((halt for halt in report.halts if halt.answered_seq == entry.seq), None)
    pause = next((ts for ts, status in reversed(record.statuses) if ts < entry.ts and status is Status.PAUSED), None)
    launched = _next(record, entry, e.AttemptIntended, e.PauseRequested)
    facts: list[Fact] = []
    what = "resumed"
    if halt is not None:
        what = "resumed after a halt"
        facts.append(Fact(label="Halted", text=f"For {duration(entry.ts - halt.at)}. {_ANSWERED}"))
    elif pause is not None and not _between(record, pause, entry.ts, e.AttemptIntended):
        facts.append(Fact(label="Paused", text=f"For {duration(entry.ts - pause)}."))
    if launched is not None and isinstance(again := launched.event, e.AttemptIntended):
        step = again.checkpoint.step if again.checkpoint else None
        where = f"From the checkpoint of step {whole(step)}" if step else "From scratch"
        facts.append(Fact(label="Resumed", text=f"{where}, as attempt {again.attempt} at {second(launched.ts)}."))
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=tuple(facts))


_ANSWERED = "An operator has decided: the halt and the spent retry budgets no longer count."


def _change(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.ChangeRequested) -> _Found:
    if any(request_behind(record, row.evidence) == event for row in report.incidents):
        return  # the entry of the change itself contains it
    fact = Fact(label="Requested", text=f"{full(change(event))} It has not begun yet.")
    yield entry_of(record, entry, "change requested", event.author, quote=event.reason, facts=(fact,))


def _declared(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.ChangesDeclared) -> _Found:
    fact = Fact(label="Planned", text=full(declared(event.planned)))
    what = f"declared {count(len(event.planned), 'planned change')}"
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(fact, _LEARNS))


_LEARNS = Fact(label="Detectors", text="From there on they learn the loss again. What changes there is no fault.")


def _driver(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.DriverChanged) -> _Found:
    back = event.driver is Driver.DAEMON
    facts = (Fact(label="Driver", text=_ASKS if event.driver is Driver.ASK else _DRIVES if back else _WATCHES),)
    what = DRIVES[event.driver].partition(":")[0]
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=facts, notable=not back)


_DRIVES = "opt-ops drives again: it acts on its own decisions."
_ASKS = "opt-ops asks before it restarts or rolls back. Without an answer, the default holds at the deadline."
_WATCHES = "An operator drives: opt-ops watches, advises, and does only what an operator requests."


def _excluded(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.NodeExcluded) -> _Found:
    if event.author is None:
        return  # an incident's entry contains it
    used = [a for a in record.state.attempts.values() if a.intended_at <= entry.ts and event.node in a.nodes]
    busy = bool(used) and (used[-1].ended_at is None or used[-1].ended_at > entry.ts)
    text = "No attempt starts there any more." + (" The attempt that runs there continues." if busy else "")
    what = f"excluded {short(event.node, 40)}"
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(Fact(label="Node", text=text),))


def _allowed(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.NodeAllowed) -> _Found:
    text = "Attempts may start there again. Earlier findings about its parts no longer count."
    what = f"allowed {short(event.node, 40)} again"
    yield entry_of(record, entry, what, event.author, quote=event.reason, facts=(Fact(label="Node", text=text),))


def _halted(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.LineageHalted) -> _Found:
    halt = next(halt for halt in report.halts if halt.seq == entry.seq)
    facts = [Fact(label="Cause", text=halt_cause(report, halt))]
    if event.incident:
        facts.append(Fact(label="Incident", text=event.incident))
    facts.append(Fact(label="Tried", text=_tried(record, report, entry.ts)))
    facts += notified(report, halt.alert)
    if halt.answered is not None:
        answer = f"By {halt.answered_by} at {second(halt.answered)}, after {duration(halt.answered - entry.ts)}."
        facts.append(Fact(label="Answered", text=answer))
    need = "is" if halt.answered is None else "was"
    yield entry_of(record, entry, f"halted, an operator {need} needed", facts=tuple(facts), notable=True)


def _tried(record: LineageRecord, report: LineageReport, until: float) -> str:
    """The actions since an operator last decided."""
    requests = [x.ts for x in record.entries if isinstance(x.event, (e.ResumeRequested, e.ChangeRequested))]
    since = max((ts for ts in requests if ts < until), default=0.0)
    tried = [
        f"{row.incident} {uncapitalized(title(row.kind))}: {row.action}, {_outcome(row)}"
        for row in report.incidents
        if since <= row.opened <= until and _is_try(row)
    ]
    earlier = f"{count(len(tried) - _TRIED, 'earlier action')}; " if len(tried) > _TRIED else ""
    return full(earlier + "; ".join(tried[-_TRIED:])) if tried else "Nothing. The first incident halted the lineage."


def _is_try(row: IncidentReport) -> bool:
    """Whether a playbook acted against a failure."""
    acted = row.action not in (None, Action.HALT, Action.ADOPT, Action.NOTIFY) and not row.advisory
    return acted and row.is_failure


def _outcome(row: IncidentReport) -> str:
    if row.closed is None:
        return "still open"
    return {True: "proven", False: "NOT PROVEN", None: "left to an operator"}[row.proven]


def _cancelled(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.LineageCancelled) -> _Found:
    facts = (Fact(label="Requested by", text=event.why),)
    yield entry_of(record, entry, "cancelled", facts=facts, notable=True)


def _alerted(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.AlertSettled) -> _Found:
    alert = record.state.alerts[event.alert]
    if event.delivered:
        if parse_alert_id(event.alert).topic == AlertTopic.WAITING:  # others are in the entry of what they are about
            facts = (Fact(label="Cause", text=full(alert.told.body.splitlines()[0])), *notified(report, event.alert))
            yield entry_of(record, entry, "waiting for nodes, on-call was paged", facts=facts)
        return
    text = f"{full(event.why)} Delivery was tried for {duration(entry.ts - alert.at)}."
    facts = (
        Fact(label="Alert", text=full(f"{alert.told.severity}: {alert.told.title}")),
        Fact(label="Cause", text=text),
    )
    yield entry_of(record, entry, "an alert was NOT delivered", facts=facts)


def _next(record: LineageRecord, entry: e.Entry, kind: type[e.Event], end: type[e.Event]) -> e.Entry | None:
    """The first entry of a kind after this one; None if one of the kind `end` comes before it."""
    for later in record.entries:
        if later.seq > entry.seq and isinstance(later.event, (kind, end)):
            return later if isinstance(later.event, kind) else None
    return None


def _between(record: LineageRecord, start: float, end: float, kind: type[e.Event]) -> bool:
    return any(start < entry.ts < end and isinstance(entry.event, kind) for entry in record.entries)


RULES: Mapping[type[e.Event], Callable[[LineageRecord, LineageReport, e.Entry, Any], _Found]] = {
    e.NoteAdded: _note,
    e.StopRequested: _stop,
    e.PauseRequested: _pause,
    e.ResumeRequested: _resume,
    e.ChangeRequested: _change,
    e.ChangesDeclared: _declared,
    e.DriverChanged: _driver,
    e.NodeExcluded: _excluded,
    e.NodeAllowed: _allowed,
    e.LineageHalted: _halted,
    e.LineageCancelled: _cancelled,
    e.AlertSettled: _alerted,
}
"""By kind of event: each gives none or one entry."""
