"""The logbook's entries: one for everything that a person on call would have written down, newest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chronicles import incidents
from chronicles.record import Record
from chronicles.words import count, drill, duration, evidence, full, minute, names, percent, rate, short, value, whole
from opt_ops.core import events as e
from opt_ops.core.proof import baseline
from opt_ops.core.values import Tier

MACHINE = "opt-ops"  # the author of what nobody typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A labelled sentence, with the log line it speaks of, if any. Plain text."""

    label: str
    text: str
    line: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """An entry. All text is plain, and much of it untrusted: whoever draws it escapes it."""

    anchor: str
    ts: float
    author: str
    run: str
    qualifier: str
    drill: str | None = None
    incident: Mapping[str, Any] | None = None
    facts: tuple[Fact, ...] = ()
    changes: tuple[tuple[str, str, str], ...] = ()
    spans: tuple[tuple[str, float], ...] = ()
    readbacks: tuple[Mapping[str, Any], ...] = ()
    quote: str = ""

    @property
    def title(self) -> str:
        """`2021-11-28 18:34 UTC [opt-ops]: 12.33 restart after …`."""
        return f"{minute(self.ts)} [{self.author}]: {self.run} {self.qualifier}"


def entries(record: Record, report: Mapping[str, Any]) -> list[LogEntry]:
    """All entries, newest first."""
    found: list[LogEntry] = []
    for entry in record.entries:
        rule = _RULES.get(type(entry.event))
        if rule is not None:
            found += rule(record, report, entry, entry.event)
    return found[::-1]


def _run_at(record: Record, ts: float) -> str:
    planned = [run.name for run in record.state.runs.values() if run.planned_at <= ts]
    return planned[-1] if planned else record.lineage


def _entry(record: Record, entry: e.Entry, qualifier: str, author: str = MACHINE, **more: Any) -> LogEntry:
    run = more.pop("run", None) or _run_at(record, entry.ts)
    return LogEntry(anchor=f"e{entry.seq}", ts=entry.ts, author=author, run=run, qualifier=qualifier, **more)


# ---- the rules: each gives none or one entry ---------------------------------------------------------------------

_Found = Iterator[LogEntry]


def _started(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.LineageStarted) -> _Found:
    shape = event.shape
    spares = f" and {count(shape.spares, 'spare')}" if shape.spares else ""
    facts = [
        Fact(label="Recipe", text=" ".join((event.recipe, *event.settings))),
        Fact(
            label="Shape",
            text=f"{count(shape.nodes, 'node')}{spares}, {count(shape.ranks_per_node, 'rank')} on each.",
        ),
    ]
    if event.data:
        facts.append(Fact(label="Data", text=names(event.data)))
    if known := baseline(record.state):
        schedule, optimizer = known
        facts.append(
            Fact(
                label="Schedule",
                text=f"Peak learning rate {rate(schedule.peak_lr)} after "
                f"{count(schedule.warmup_steps, 'warm-up step')}, falling to {percent(schedule.final_fraction)} of it "
                f"at step {whole(schedule.total_steps)}; training ends at step {whole(report['total_steps'])}.",
            )
        )
        facts.append(
            Fact(
                label="Optimizer",
                text=f"Betas {names(optimizer.betas)}, weight decay {optimizer.weight_decay:g}, "
                f"gradients clipped at {optimizer.clip_norm:g}.",
            )
        )
    versions = next((a.versions for a in record.state.attempts.values() if a.versions), None)
    if versions:
        facts.append(Fact(label="Versions", text=full(value(versions), keep=tuple(versions))))
    run = next(iter(record.state.runs), record.lineage)
    yield _entry(record, entry, "started", event.author, run=run, facts=tuple(facts))


def _incident(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.IncidentOpened) -> _Found:
    row = next(row for row in report["incidents"] if row["incident"] == event.incident)
    yield LogEntry(
        anchor=row["incident"],
        ts=entry.ts,
        author=MACHINE,
        run=row["run_after"] or row["run_before"] or _run_at(record, entry.ts),
        qualifier=incidents.qualifier(row),
        drill=row["drill"],
        incident=row,
        facts=tuple(Fact(label=label, text=text, line=line) for label, text, line in incidents.facts(record, row)),
        changes=tuple(incidents.changes(record, row)),
        spans=tuple(incidents.spans(row)) if row["next_attempt"] else (),
        readbacks=tuple(incidents.readbacks(row)),
    )


def _daemon(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.DaemonStarted) -> _Found:
    opened = {i.opened_epoch for i in record.state.incidents.values() if i.kind == "daemon_restart"}
    if event.blind_seconds is None or entry.epoch in opened:
        return
    text = f"It had been away for {duration(event.blind_seconds)}; version {event.version}, policy {event.policy}."
    yield _entry(record, entry, "daemon restart, no rank was running", facts=(Fact(label="Daemon", text=text),))


def _note(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.NoteAdded) -> _Found:
    state = record.state
    run = state.attempts[event.target].run if event.target in state.attempts else None
    run = event.target if event.target in state.runs else run
    about = "" if event.target in (record.lineage, run) else f" on {short(event.target, 40)}"
    yield _entry(record, entry, f"note{about}", event.author, run=run, quote=event.text)


def _stop(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.StopRequested) -> _Found:
    yield _entry(record, entry, "stop asked for", event.author, quote=event.reason)


def _drill(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.DrillRequested) -> _Found:
    row = next(row for row in report["drills"] if row["drill"] == event.drill)
    if row["incident"]:
        return  # the incident's own entry tells it
    where = f" into attempt {event.attempt}" if event.attempt else ""
    state = "no incident has followed" if row["done"] else "not in yet"
    fact = Fact(label="Drill", text=full(f"{drill(event.fault, event.arguments)}{where}; {state}"))
    yield _entry(record, entry, f"drill {event.fault}", event.author, drill=event.drill, facts=(fact,))


def _alert(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.SignalRaised) -> _Found:
    if event.tier is not Tier.ALERT:
        return
    for row in report["incidents"]:
        first = row["onset_step"]
        if row["attempt"] == event.attempt and first is not None and first <= (event.step or 0) <= row["step_failed"]:
            return  # it became an incident, whose entry tells of the alert
    told, line = evidence(event.evidence)
    facts = (
        Fact(label="Evidence", text=f"{full(event.rule)} {full(told)}", line=line),
        Fact(label="Decision", text=_HEALED),
    )
    what = event.signal.replace("_", " ")
    run = record.state.attempts[event.attempt].run
    yield _entry(record, entry, f"alert: {what} at {whole(event.step)}, nothing touched", run=run, facts=facts)


_HEALED = "An alert only watches: most of these heal by themselves, and this one has not become an incident."


def _refused(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.CheckpointRefused) -> _Found:
    point = event.checkpoint
    fact = Fact(label="Cause", text=f"{full(event.why)} It will never be resumed from.")
    yield _entry(record, entry, f"checkpoint {whole(point.step)} refused: damaged", run=point.run, facts=(fact,))


def _nodes(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.AllocationSubmitted) -> _Found:
    if event.allocation == next(iter(record.state.allocations)):
        return  # the first one belongs to the start
    allocation = record.state.allocations[event.allocation]
    without = f" without {names(allocation.exclude)}" if allocation.exclude else ""
    fact = Fact(label="Nodes", text=f"{count(allocation.wanted, 'node')} asked for{without}, as job {event.job}.")
    yield _entry(record, entry, f"new allocation, job {short(event.job, 40)}", facts=(fact,))


def _no_nodes(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.AllocationFailed) -> _Found:
    yield _entry(record, entry, "no nodes", facts=(Fact(label="Cause", text=full(event.why)),))


def _completed(record: Record, report: Mapping[str, Any], entry: e.Entry, event: e.LineageCompleted) -> _Found:
    spent = report["goodput"]
    text = f"All {whole(event.step)} steps in {duration(spent['wall_seconds'])}, goodput {percent(spent['goodput'])}."
    yield _entry(record, entry, "completed", facts=(Fact(label="Result", text=text),))


def _halted(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.LineageHalted) -> _Found:
    facts = [Fact(label="Cause", text=full(event.why))]
    if event.incident:
        facts.append(Fact(label="Incident", text=event.incident))
    yield _entry(record, entry, "halted, a human is needed", facts=tuple(facts))


def _cancelled(record: Record, _: Mapping[str, Any], entry: e.Entry, event: e.LineageCancelled) -> _Found:
    yield _entry(record, entry, "cancelled", facts=(Fact(label="Asked by", text=event.why),))


_RULES: dict[type[e.Event], Callable[[Record, Mapping[str, Any], e.Entry, Any], _Found]] = {
    e.LineageStarted: _started,
    e.DaemonStarted: _daemon,
    e.IncidentOpened: _incident,
    e.NoteAdded: _note,
    e.StopRequested: _stop,
    e.DrillRequested: _drill,
    e.SignalRaised: _alert,
    e.CheckpointRefused: _refused,
    e.AllocationSubmitted: _nodes,
    e.AllocationFailed: _no_nodes,
    e.LineageCompleted: _completed,
    e.LineageHalted: _halted,
    e.LineageCancelled: _cancelled,
}
