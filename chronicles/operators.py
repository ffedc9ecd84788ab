"""What people asked for and what they were told, as rows of the report, from the journal's entries alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chronicles.record import LineageRecord
from chronicles.wording import full, names, rate, whole
from opt_ops.core import events as e
from opt_ops.core.text import iso
from opt_ops.core.values import Action, Driver

DRIVES = {
    Driver.DAEMON: "handed back to opt-ops",
    Driver.PERSON: "took over: opt-ops watches and advises",
    Driver.SHADOW: "opt-ops only watches: another launcher runs the training",
}


def operators(record: LineageRecord) -> list[dict[str, Any]]:
    """Every request that steers the lineage, the refused ones among them; notes and drills have lists of their own."""
    return [row for entry in record.entries for row in _request(entry)]


def _request(entry: e.Entry) -> Iterator[dict[str, Any]]:
    asked = _asked(entry.event)
    if asked is None:
        return
    verb, what, reason = asked
    event: Any = entry.event
    refused = isinstance(event, e.RequestRefused)
    yield {
        "at": iso(entry.ts),
        "author": event.author,
        "request": event.request,
        "verb": verb,
        "what": what,
        "reason": reason or None,
        "refused": event.why if refused else None,
    }


def _asked(event: e.Event) -> tuple[str, str, str] | None:
    """Verb, what it means, and why it was asked for."""
    match event:
        case e.LineageStarted():
            return "start", "start", ""
        case e.StopRequested():
            return "stop", "stop for good", event.reason
        case e.PauseRequested():
            return "pause", "pause, and keep the nodes" if event.keep_nodes else "pause", event.reason
        case e.ResumeRequested():
            return "resume", "go on", event.reason
        case e.ChangeRequested():
            return "change", change(event), event.reason
        case e.DriverChanged():
            return "drive", DRIVES[event.driver], event.reason
        case e.NodeExcluded(author=str()):
            return "exclude", f"take {event.node} out", event.reason
        case e.NodeAllowed():
            return "allow", f"let attempts start on {event.node} again", event.reason
        case e.RequestRefused():
            return event.verb, event.verb, ""
        case _:
            return None


def change(event: e.ChangeRequested) -> str:
    """`roll back to 400, learning rate × 0.75, leave out 60 batches`."""
    parts = [f"roll back to {whole(event.to_step)}"] if event.to_step is not None else []
    return ", ".join([*parts, *altered(event.lr, event.lr_factor, event.settings, event.skip_batches)]) or "a new run"


def altered(lr: float | None, lr_factor: float | None, settings: Any, skip_batches: int) -> list[str]:
    """What of the settings is changed: also of a playbook's rollback."""
    parts = [f"learning rate {rate(lr)}"] if lr is not None else []
    parts += [f"learning rate × {lr_factor:g}"] if lr_factor is not None else []
    parts += [names(settings)] if settings else []
    return [*parts, *([f"{batches(skip_batches)} left out"] if skip_batches else [])]


def batches(number: int) -> str:
    """`1 batch`, `60 batches`."""
    return f"{whole(number)} batch{'' if number == 1 else 'es'}"


def alerts(record: LineageRecord) -> list[dict[str, Any]]:
    """What people were told, and whether it reached them; `delivered` null: it is on its way."""
    settled = {
        entry.event.alert: (entry.ts, entry.event)
        for entry in record.entries
        if isinstance(entry.event, e.AlertSettled)
    }
    found: list[dict[str, Any]] = []
    for name, alert in record.state.alerts.items():
        at, outcome = settled.get(name, (None, None))
        found.append(
            {
                "alert": name,
                "severity": str(alert.told.severity),
                "title": alert.told.title,
                "at": iso(alert.at),
                "delivered": outcome.delivered if outcome else None,
                "settled": iso(at),
                "why": (outcome.why or None) if outcome else None,
            }
        )
    return found


def told(record: LineageRecord) -> dict[str, str | None]:
    """When people were told of each incident: of what is done about it, or that it halted the lineage."""
    reached = {row["alert"]: row["settled"] for row in alerts(record) if row["delivered"]}
    found = {name: reached.get(f"{name}/opened") for name in record.state.incidents}
    for row in halts(record):
        if row["incident"] is not None:
            found[row["incident"]] = found.get(row["incident"]) or reached.get(row["alert"])
    return found


_ANSWERS = (e.ResumeRequested, e.ChangeRequested, e.StopRequested)


def halts(record: LineageRecord) -> list[dict[str, Any]]:
    """Every time that a human was needed, and whose answer ended it."""
    found: list[dict[str, Any]] = []
    for entry in record.entries:
        event = entry.event
        if isinstance(event, e.LineageHalted):
            found.append(
                {
                    "at": iso(entry.ts),
                    "why": event.why,
                    "incident": event.incident,
                    "alert": f"{record.lineage}/halted/{entry.ts:.3f}",
                    "answered": None,
                    "answered_by": None,
                }
            )
        elif isinstance(event, _ANSWERS) and found and found[-1]["answered"] is None:
            found[-1] |= {"answered": iso(entry.ts), "answered_by": event.author}
    return found


def halt_cause(report: Mapping[str, Any], halt: Mapping[str, Any]) -> str:
    """What the halt was about: the incident behind it and why nothing more was tried."""
    row = next((row for row in report["incidents"] if row["incident"] == halt["incident"]), None)
    if row is None or row["action"] != Action.HALT:
        return full(halt["why"])
    playbook = row["playbook"].partition("/")[0]
    return f"{full(row['cause'], keep=row['nodes'])} Playbook {full(row['why'], keep=(playbook,))}"


def paused(record: LineageRecord) -> dict[str, Any] | None:
    """The pause that is in force or on its way."""
    asked = record.state.paused
    at = next((entry.ts for entry in reversed(record.entries) if entry.event == asked), None)
    if asked is None or record.state.ended:
        return None
    return {"at": iso(at), "author": asked.author, "reason": asked.reason, "keep_nodes": asked.keep_nodes}


def is_planned(kind: str, signal: str | None) -> bool:
    """Whether an incident is a move of a healthy attempt: a time limit that was seen to come, or more nodes."""
    return kind == "nodes_returned" or (kind == "time_limit" and signal is None)


def asked_for(record: LineageRecord, evidence: Mapping[str, Any]) -> e.ChangeRequested | None:
    """The operator's request behind an incident, if one is."""
    return record.state.changes.get(str(evidence.get("request")))


MOVES = (Action.RESTART, Action.ROLLBACK, Action.CHANGE)
"""The actions that end in another attempt."""
