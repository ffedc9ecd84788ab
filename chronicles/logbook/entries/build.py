"""The logbook's entries: one for everything that a person on call would have written down, newest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from chronicles.logbook.drawing.closeup import Closeups
from chronicles.logbook.drawing.figure import RUN_COLORS
from chronicles.logbook.entries import allocations, incidents, operators
from chronicles.logbook.entries.entry import MACHINE, Fact, LogEntry, Remark, entry_of, run_at
from chronicles.operators import DRIVES, asked_for
from chronicles.record import LineageRecord
from chronicles.wording import count, drill, duration, evidence, full, names, percent, rate, short, value, whole
from opt_ops.core import events as e
from opt_ops.core.decide.proof import baseline
from opt_ops.core.text import from_iso
from opt_ops.core.values import Driver, Tier


def entries(record: LineageRecord, report: Mapping[str, Any]) -> list[LogEntry]:
    """All entries, newest first."""
    found: list[LogEntry] = []
    configured: e.AttemptConfigured | None = None
    for entry in record.entries:
        rule = _RULES.get(type(entry.event))
        if rule is not None:
            found += rule(record, report, entry, entry.event)
        if isinstance(entry.event, e.AttemptConfigured):
            found += _launched(record, entry, entry.event, configured) if configured else ()
            configured = entry.event
    found = _with_closeups(record, list(allocations.attached(record, report, found)))
    remarks = _remarks(record, {entry.anchor for entry in found})
    below = {f"e{remark.seq}" for attached in remarks.values() for remark in attached}
    rest = [entry for entry in reversed(found) if entry.anchor not in below]
    return [replace(entry, remarks=tuple(remarks.get(entry.anchor, ()))) for entry in rest]


def _with_closeups(record: LineageRecord, found: list[LogEntry]) -> list[LogEntry]:
    near = Closeups(record, {run: f"run-{number % RUN_COLORS}" for number, run in enumerate(record.state.runs)})
    return [replace(entry, closeup=near.draw(entry.incident)) if entry.incident else entry for entry in found]


def _remarks(record: LineageRecord, anchors: AbstractSet[str]) -> dict[str, list[Remark]]:
    """The notes on entries, by anchor."""
    found: dict[str, list[Remark]] = {}
    for entry in record.entries:
        if isinstance(entry.event, e.NoteAdded) and (anchor := operators.anchored(entry.event)) in anchors:
            note = entry.event
            remark = Remark(seq=entry.seq, ts=entry.ts, author=note.author, text=note.text, correction=note.correction)
            found.setdefault(anchor, []).append(remark)
    return found


# ---- the rules: each gives none or one entry ---------------------------------------------------------------------

_Found = Iterator[LogEntry]


def _started(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.LineageStarted) -> _Found:
    shape = event.shape
    spares = f" and {count(shape.spares, 'spare')}" if shape.spares else ""
    fewer = f" Rather than wait, {whole(shape.min_nodes)} will do." if shape.min_nodes else ""
    facts = [
        Fact(label="Recipe", text=" ".join((event.recipe, *event.settings))),
        Fact(
            label="Shape",
            text=f"{count(shape.nodes, 'node')}{spares}, {count(shape.ranks_per_node, 'rank')} on each.{fewer}",
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
                f"{count(schedule.warmup_steps, 'warm-up step')}, falling to {100 * schedule.final_fraction:g} % of it "
                f"at step {whole(schedule.total_steps)}{_ends(schedule.total_steps, report['total_steps'])}.",
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
    if event.driver is not Driver.DAEMON:
        facts.append(Fact(label="Driver", text=DRIVES[event.driver]))
    how = ", in shadow mode" if event.driver is Driver.SHADOW else ""
    yield entry_of(record, entry, f"started{how}", event.author, run=run, facts=tuple(facts))


def _ends(falls_until: int, total: int | None) -> str:
    return ", where training ends" if falls_until == total else f"; training ends at step {whole(total)}"


def _incident(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.IncidentOpened) -> _Found:
    row = next(row for row in report["incidents"] if row["incident"] == event.incident)
    asked = asked_for(record, row["evidence"])
    yield LogEntry(
        anchor=row["incident"],
        ts=entry.ts,
        author=asked.author if asked else MACHINE,
        run=row["run_after"] or row["run_before"] or run_at(record, entry.ts),
        qualifier=incidents.qualifier(record, row),
        drill=row["drill"],
        incident=row,
        facts=tuple(Fact(label=label, text=text, line=line) for label, text, line in incidents.facts(record, row)),
        changes=tuple(incidents.changes(record, row)),
        spans=tuple(incidents.spans(row)) if row["next_attempt"] else (),
        readbacks=tuple(incidents.readbacks(row)),
        stacks=tuple(incidents.stacks(row)),
        quote=asked.reason if asked else "",
    )


def _launched(record: LineageRecord, entry: e.Entry, event: e.AttemptConfigured, before: e.AttemptConfigured) -> _Found:
    """Other versions than the attempt before: nobody may learn of that from the curve."""
    known, now = before.versions, event.versions
    changed = tuple(
        (name, *(value(versions[name]) if name in versions else "" for versions in (known, now)))
        for name in dict.fromkeys((*known, *now))
        if known.get(name) != now.get(name)
    )
    if changed:
        text = f"Attempt {event.attempt} runs under other versions than attempt {before.attempt} did. {_UNASKED}"
        what = f"versions changed: {short(', '.join(name for name, _, _ in changed), 80)}"
        run = record.state.attempts[event.attempt].run
        yield entry_of(record, entry, what, run=run, facts=(Fact(label="Launch", text=text),), changes=changed)


_UNASKED = "Results may differ by more than rounding; nothing here says that anybody wanted it."


def _daemon(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.DaemonStarted) -> _Found:
    opened = {i.opened_epoch for i in record.state.incidents.values() if i.kind == "daemon_restart"}
    if event.blind_seconds is None or entry.epoch in opened:
        return
    text = f"It had been away for {duration(event.blind_seconds)}; version {event.version}, policy {event.policy}."
    yield entry_of(record, entry, "daemon restart, no rank was running", facts=(Fact(label="Daemon", text=text),))


def _drill(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.DrillRequested) -> _Found:
    row = next(row for row in report["drills"] if row["drill"] == event.drill)
    if row["incident"]:
        return  # the incident's own entry tells it
    where = f" into attempt {event.attempt}" if event.attempt else ""
    state = "no incident has followed" if row["done"] else "not in yet"
    fact = Fact(label="Drill", text=full(f"{drill(event.fault, event.arguments)}{where}; {state}"))
    yield entry_of(record, entry, f"drill {event.fault}", event.author, drill=event.drill, facts=(fact,))


def _alert(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.SignalRaised) -> _Found:
    if event.tier is not Tier.ALERT:
        return
    same = [row for row in report["incidents"] if incidents.leads(row, event.step)]
    if any(row["attempt"] == event.attempt for row in same):
        return  # it became an incident, whose entry tells of the alert
    again = next((row for row in same if row["kind"] == event.signal and from_iso(row["opened"]) > entry.ts), None)
    told, line = evidence(event.evidence)
    facts = [
        Fact(label="Evidence", text=f"{full(event.rule)} {full(told)}", line=line),
        Fact(label="Decision", text=_UNSAVED if event.signal == "save_failed" else _healed(again)),
        *operators.told(report, f"{record.lineage}/{event.key}"),
    ]
    what = event.signal.replace("_", " ")
    run = record.state.attempts[event.attempt].run
    yield entry_of(record, entry, f"alert: {what} at {whole(event.step)}, nothing touched", run=run, facts=tuple(facts))


_UNSAVED = "Training goes on, but every step since the last checkpoint that was saved can be lost."


def _healed(again: Mapping[str, Any] | None) -> str:
    most = "An alert only watches: most of these heal by themselves"
    if again is None:
        return f"{most}, and this one has not become an incident."
    return f"{most}. This one came again in attempt {again['attempt']}, as {again['incident']}."


def _refused(record: LineageRecord, _: Mapping[str, Any], entry: e.Entry, event: e.CheckpointRefused) -> _Found:
    point = event.checkpoint
    fact = Fact(label="Cause", text=f"{full(event.why)} It will never be resumed from.")
    yield entry_of(record, entry, f"checkpoint {whole(point.step)} refused: damaged", run=point.run, facts=(fact,))


def _size(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.SizeDecided) -> _Found:
    of = record.state.shape.nodes
    sizes = [(x.ts, x.event.nodes) for x in record.entries if isinstance(x.event, e.SizeDecided)]
    before = next((nodes for ts, nodes in reversed(sizes) if ts < entry.ts), of)
    until = next((ts for ts, _ in sizes if ts > entry.ts), float("inf"))
    grown = [i for i in record.state.incidents.values() if i.kind == "nodes_returned"]
    if event.nodes > before and any(entry.ts <= i.opened_at < until for i in grown):
        return  # the move's own entry tells it
    facts = (Fact(label="Nodes", text=full(event.why)), Fact(label="Results", text=_SAME_BATCHES))
    what = "shrunk" if event.nodes < before else "growing"
    yield entry_of(record, entry, f"{what} to {event.nodes} of {count(of, 'node')}", facts=facts)


_SAME_BATCHES = "The global batch and the order of the data stay; results agree to rounding, not to the bit."


def _stray(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.StrayFound) -> _Found:
    done = event.job not in record.state.orphan_jobs
    owner = f"It bears the name of allocation {event.allocation}, which does not account for it."
    text = f"{owner} {'It was cancelled' if done else 'It is being cancelled'}, so that it holds no nodes unseen."
    what = f"stray job {short(event.job, 40)} {'cancelled' if done else 'found'}"
    yield entry_of(record, entry, what, facts=(Fact(label="Cause", text=text),))


def _no_nodes(record: LineageRecord, _: Mapping[str, Any], entry: e.Entry, event: e.AllocationFailed) -> _Found:
    yield entry_of(record, entry, "no nodes", facts=(Fact(label="Cause", text=full(event.why)),))


def _completed(record: LineageRecord, report: Mapping[str, Any], entry: e.Entry, event: e.LineageCompleted) -> _Found:
    spent = report["goodput"]
    text = f"All {whole(event.step)} steps in {duration(spent['wall_seconds'])}, goodput {percent(spent['goodput'])}."
    yield entry_of(record, entry, "completed", facts=(Fact(label="Result", text=text),))


_RULES: dict[type[e.Event], Callable[[LineageRecord, Mapping[str, Any], e.Entry, Any], _Found]] = {
    **operators.RULES,
    e.LineageStarted: _started,
    e.DaemonStarted: _daemon,
    e.IncidentOpened: _incident,
    e.DrillRequested: _drill,
    e.SignalRaised: _alert,
    e.CheckpointRefused: _refused,
    e.AllocationFailed: _no_nodes,
    e.SizeDecided: _size,
    e.StrayFound: _stray,
    e.LineageCompleted: _completed,
}
