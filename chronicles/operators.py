"""What operators requested and what they were notified of, from the journal's entries alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chronicles.record import LineageRecord, Moment, moment
from chronicles.wording import names, rate, short, whole
from opt_ops.core import events as e
from opt_ops.core.names import AlertTopic, alert_id, parse_alert_id
from opt_ops.core.values import Driver, PlannedChange, Severity

DRIVES = {
    Driver.DAEMON: "handed back to opt-ops",
    Driver.OPERATOR: "took over: opt-ops watches and advises",
    Driver.ASK: "wants to be asked: opt-ops proposes, and acts once that is approved",
    Driver.SHADOW: "opt-ops only watches: another launcher runs the training",
}
_INTERNAL = {"key": ""}  # no field of report.json


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRequest:
    """A request that steers the lineage."""

    at: Moment
    author: str
    request: str
    verb: str
    what: str  # what the request means
    reason: str | None
    refused: str | None  # why it was refused


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertReport:
    """An alert, and whether it was delivered."""

    alert: str
    severity: Severity
    title: str
    at: Moment
    delivered: bool | None  # None: still being delivered
    settled: Moment | None  # when it was delivered, or given up
    why: str | None  # why it was not delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltReport:
    """A halt of the lineage, and the operator's request that ended it."""

    at: Moment
    why: str
    incident: str | None
    alert: str  # its id, also where none was sent
    answered: Moment | None
    answered_by: str | None
    seq: int = field(metadata=_INTERNAL)  # of its entry in the journal, and of the request's
    answered_seq: int | None = field(default=None, metadata=_INTERNAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseReport:
    """A pause that is in force or about to begin."""

    at: Moment | None
    author: str
    reason: str
    keep_nodes: bool


def operator_requests(record: LineageRecord) -> list[OperatorRequest]:
    """Every request that steers the lineage, refused ones included. Notes and drills have lists of their own."""
    found: list[OperatorRequest] = []
    for entry in record.entries:
        request = _request(entry.event)
        if request is not None:
            verb, what, reason = request
            event: Any = entry.event
            found.append(
                OperatorRequest(
                    at=Moment(entry.ts),
                    author=event.author,
                    request=event.request,
                    verb=verb,
                    what=what,
                    reason=reason or None,
                    refused=event.why if isinstance(event, e.RequestRefused) else None,
                )
            )
    return found


def _request(event: e.Event) -> tuple[str, str, str] | None:
    """Verb, meaning and reason of a request; None for other events."""
    match event:
        case e.LineageStarted():
            return "start", "start", ""
        case e.StopRequested():
            return "stop", "stop for good", event.reason
        case e.PauseRequested():
            return "pause", "pause and keep the nodes" if event.keep_nodes else "pause", event.reason
        case e.ResumeRequested():
            return "resume", "resume", event.reason
        case e.ChangeRequested():
            return "change", change(event), event.reason
        case e.ChangesDeclared():
            return "plan", declared(event.planned), event.reason
        case e.DriverChanged():
            return "drive", DRIVES[event.driver], event.reason
        case e.NodeExcluded(author=str()):
            return "exclude", f"exclude {event.node}", event.reason
        case e.NodeAllowed():
            return "allow", f"allow attempts on {event.node} again", event.reason
        case e.RequestRefused():
            return event.verb, event.verb, ""
        case _:
            return None


def declared(planned: Sequence[PlannedChange]) -> str:
    """`planned from step 48,000 on: stage b`."""
    named = (f"from step {whole(each.step)} on: {short(each.what or 'a change', 120)}" for each in planned)
    return f"planned {'; '.join(named)}"


def change(event: e.ChangeRequested) -> str:
    """`roll back to step 400, learning rate × 0.75, 60 batches skipped`."""
    back = [f"roll back to step {whole(event.to_step)}"] if event.to_step is not None else []
    changed = changed_settings(event.lr, event.lr_factor, event.settings, event.skip_batches)
    changed += [f"data {names(event.data)}"] if event.data else []
    return ", ".join([*back, *changed]) or "a new run"


def changed_settings(
    lr: float | None, lr_factor: float | None, settings: Sequence[str], skip_batches: int
) -> list[str]:
    """What a request or a playbook's rollback changes: `learning rate × 0.75`."""
    parts = [f"learning rate {rate(lr)}"] if lr is not None else []
    parts += [f"learning rate × {lr_factor:g}"] if lr_factor is not None else []
    parts += [names(settings)] if settings else []
    return [*parts, *([f"{batches(skip_batches)} skipped"] if skip_batches else [])]


def batches(number: int) -> str:
    """`1 batch`, `60 batches`."""
    return f"{whole(number)} batch{'' if number == 1 else 'es'}"


def alerts(record: LineageRecord) -> list[AlertReport]:
    """Every alert, in the order in which they were decided."""
    outcomes = {x.event.alert: (x.ts, x.event) for x in record.entries if isinstance(x.event, e.AlertSettled)}
    found: list[AlertReport] = []
    for name, alert in record.state.alerts.items():
        at, outcome = outcomes.get(name, (None, None))
        found.append(
            AlertReport(
                alert=name,
                severity=alert.told.severity,
                title=alert.told.title,
                at=Moment(alert.at),
                delivered=outcome.delivered if outcome else None,
                settled=moment(at),
                why=(outcome.why or None) if outcome else None,
            )
        )
    return found


def notified_at(record: LineageRecord) -> dict[str, Moment | None]:
    """By incident: when operators were notified that it was acted on, or that it halted the lineage."""
    delivered = {alert.alert: alert.settled for alert in alerts(record) if alert.delivered}
    found = {name: delivered.get(alert_id(name, AlertTopic.OPENED)) for name in record.state.incidents}
    for halt in halts(record):
        if halt.incident is not None:
            found[halt.incident] = found.get(halt.incident) or delivered.get(halt.alert)
    return found


_ANSWERS = (e.ResumeRequested, e.ChangeRequested, e.StopRequested)


def halts(record: LineageRecord) -> list[HaltReport]:
    """Every halt, with its alert and the operator's request that ended it: both follow it in the journal."""
    found: list[HaltReport] = []
    for entry in record.entries:
        event = entry.event
        if isinstance(event, e.LineageHalted):
            found.append(
                HaltReport(
                    at=Moment(entry.ts),
                    why=event.why,
                    incident=event.incident,
                    alert=alert_id(record.lineage, AlertTopic.HALTED, entry.ts),
                    answered=None,
                    answered_by=None,
                    seq=entry.seq,
                )
            )
        elif isinstance(event, e.AlertIntended) and found and _is_of_halt(event):
            found[-1] = replace(found[-1], alert=event.alert)
        elif isinstance(event, _ANSWERS) and found and found[-1].answered is None:
            answer = {"answered": Moment(entry.ts), "answered_by": event.author, "answered_seq": entry.seq}
            found[-1] = replace(found[-1], **answer)
    return found


def _is_of_halt(event: e.AlertIntended) -> bool:
    return parse_alert_id(event.alert).topic == AlertTopic.HALTED


def pause_in_force(record: LineageRecord) -> PauseReport | None:
    """The pause that is in force or about to begin, if there is one."""
    requested = record.state.paused
    at = next((entry.ts for entry in reversed(record.entries) if entry.event == requested), None)
    if requested is None or record.state.ended:
        return None
    return PauseReport(at=moment(at), author=requested.author, reason=requested.reason, keep_nodes=requested.keep_nodes)


def request_behind(record: LineageRecord, evidence: Mapping[str, Any]) -> e.ChangeRequested | None:
    """The operator's request behind an incident, if there is one."""
    return record.state.changes.get(str(evidence.get("request")))
