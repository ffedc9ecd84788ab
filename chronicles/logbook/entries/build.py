"""The logbook's entries: one for everything that a person on call would have written down, newest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, TypeGuard

from chronicles.logbook.drawing.closeup import Closeups
from chronicles.logbook.drawing.curves import run_color
from chronicles.logbook.entries import allocations, evaluations, incidents, operators, schedule_words, watch
from chronicles.logbook.entries.changes import changes
from chronicles.logbook.entries.entry import MACHINE, Change, Fact, LogEntry, Remark, entry_of, run_at
from chronicles.operators import DRIVES, request_behind
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import (
    count,
    drill,
    duration,
    evidence,
    full,
    names,
    percent,
    short,
    uncapitalized,
    value,
    whole,
)
from opt_ops.core import events as e
from opt_ops.core.decide.proof import baseline
from opt_ops.core.failures.classes import AlertSignal, FailureClass, title
from opt_ops.core.names import alert_id
from opt_ops.core.values import ENDED, AllocationStatus, Deduplicated, Driver, Tier


def entries(record: LineageRecord, report: LineageReport) -> list[LogEntry]:
    """All entries, newest first."""
    found: list[LogEntry] = []
    configured: e.AttemptConfigured | None = None
    tested = evaluations.first_results(record)
    for entry in record.entries:
        rule = _RULES.get(type(entry.event))
        if rule is not None:
            found += rule(record, report, entry, entry.event)
        if (checkpoint := tested.get(entry.seq)) is not None:
            found.append(evaluations.entry(record, report, entry, *checkpoint))
        if isinstance(entry.event, e.AttemptConfigured):
            found += _launched(record, entry, entry.event, configured) if configured else ()
            configured = entry.event
    found = _with_closeups(record, list(allocations.attached(record, report, found)))
    remarks = _remarks(record, {entry.anchor for entry in found})
    below = {f"e{remark.seq}" for attached in remarks.values() for remark in attached}
    rest = [entry for entry in reversed(found) if entry.anchor not in below]
    return [replace(entry, remarks=tuple(remarks.get(entry.anchor, ()))) for entry in rest]


def _with_closeups(record: LineageRecord, found: list[LogEntry]) -> list[LogEntry]:
    closeups = Closeups(record, {run: run_color(place) for place, run in enumerate(record.state.runs)})
    return [replace(entry, closeup=closeups.draw(entry.incident)) if entry.incident else entry for entry in found]


def _remarks(record: LineageRecord, anchors: AbstractSet[str]) -> dict[str, list[Remark]]:
    """The notes on entries, by anchor."""
    found: dict[str, list[Remark]] = {}
    for entry in record.entries:
        if isinstance(entry.event, e.NoteAdded) and (anchor := operators.anchor(entry.event)) in anchors:
            note = entry.event
            remark = Remark(seq=entry.seq, ts=entry.ts, author=note.author, text=note.text, correction=note.correction)
            found.setdefault(anchor, []).append(remark)
    return found


# ---- the rules: each gives none or one entry ---------------------------------------------------------------------

_Found = Iterator[LogEntry]


def _started(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.LineageStarted) -> _Found:
    shape = event.shape
    spares = f" and {count(shape.spares, 'spare')}" if shape.spares else ""
    fewer = f" Attempts may start on {count(shape.min_nodes, 'node')} if no more come." if shape.min_nodes else ""
    per_node = f"{count(shape.ranks_per_node, 'rank')} per node"
    facts = [
        Fact(label="Recipe", text=" ".join((event.recipe, *event.settings))),
        Fact(label="Shape", text=f"{count(shape.nodes, 'node')}{spares}, {per_node}.{fewer}"),
    ]
    if event.data:
        facts.append(Fact(label="Data", text=names(event.data)))
    facts += [Fact(label="Deduplicated", text=_without_copies(each)) for each in _first_dedup(record)]
    if event.init_from:
        facts.append(Fact(label="First weights", text=event.init_from))
    if event.parent:
        origin = f"{event.parent.run} at step {whole(event.parent.step)}: {event.parent.checkpoint}"
        facts.append(Fact(label="Forked from", text=origin))
    if event.reason:
        facts.append(Fact(label="Reason", text=event.reason))
    if known := baseline(record.state):
        schedule, optimizer = known
        facts.append(Fact(label="Schedule", text=schedule_words.in_words(schedule, report.total_steps)))
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
        facts.append(Fact(label="Driver", text=full(DRIVES[event.driver], keep=("opt-ops",))))
    how = " in shadow mode" if event.driver is Driver.SHADOW else ""
    if event.parent:
        how = f" as a fork of {event.parent.run} at step {whole(event.parent.step)}"
    yield entry_of(record, entry, f"started{how}", event.author, run=run, facts=tuple(facts))


def _first_dedup(record: LineageRecord) -> Sequence[Deduplicated]:
    configured = (entry.event for entry in record.entries if isinstance(entry.event, e.AttemptConfigured))
    return next((event.dedup for event in configured if event.dedup), ())


def _without_copies(each: Deduplicated) -> str:
    removed = each.removed
    reasons = (
        f"{whole(removed['exact'])} exact copies, {whole(removed['near'])} near copies (J ≥ {each.threshold:g}), "
        f"{whole(removed['contaminated'])} that share text with test sets, {whole(removed['corrupt'])} corrupt lines"
    )
    return (
        f"{short(each.source)}: {whole(each.documents_out)} of {whole(each.documents_in)} documents stayed. Removed: "
        f"{reasons}. Digest {short(each.digest, 19)}."
    )


def _incident(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.IncidentOpened) -> _Found:
    row = next(row for row in report.incidents if row.incident == event.incident)
    request = request_behind(record, row.evidence)
    yield LogEntry(
        anchor=row.incident,
        ts=entry.ts,
        author=request.author if request else MACHINE,
        run=row.run_after or row.run_before or run_at(record, entry.ts),
        title=incidents.title(record, row),
        drill=row.drill,
        incident=row,
        facts=tuple(incidents.facts(record, row)),
        changes=tuple(changes(record, row)),
        spans=tuple(incidents.spans(row)) if row.next_attempt or row.in_place else (),
        stacks=tuple(incidents.stacks(row)),
        trials=tuple(incidents.trials(row)),
        quote=request.reason if request else "",
        notable=incidents.is_notable(row),
    )


def _launched(record: LineageRecord, entry: e.Entry, event: e.AttemptConfigured, before: e.AttemptConfigured) -> _Found:
    """An attempt under other versions than the one before."""
    known, now = before.versions, event.versions
    changed = tuple(
        Change(name, *(value(versions[name]) if name in versions else "" for versions in (known, now)))
        for name in dict.fromkeys((*known, *now))
        if known.get(name) != now.get(name)
    )
    if changed:
        text = f"Attempt {event.attempt} runs under other versions than attempt {before.attempt}. {_VERSIONS}"
        what = f"versions changed: {short(', '.join(change.what for change in changed), 80)}"
        run = record.state.attempts[event.attempt].run
        facts = (Fact(label="Launch", text=text),)
        yield entry_of(record, entry, what, run=run, facts=facts, changes=changed, notable=True)


_VERSIONS = "Results may differ by more than rounding. The journal does not say that an operator intended it."


def _daemon(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.DaemonStarted) -> _Found:
    restarts = (i for i in record.state.incidents.values() if i.kind == FailureClass.DAEMON_RESTART)
    if event.blind_seconds is None or entry.epoch in {incident.opened_epoch for incident in restarts}:
        return
    statuses = [status for since, status in record.statuses if since <= entry.ts]
    if statuses and statuses[-1] in ENDED:
        return  # it takes up an ended lineage because somebody asked for something; nothing was unwatched
    text = f"No daemon watched for {duration(event.blind_seconds)}. Version {event.version}, policy {event.policy}."
    yield entry_of(record, entry, "daemon restarted, no rank was running", facts=(Fact(label="Daemon", text=text),))


def _drill(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.DrillRequested) -> _Found:
    row = next(row for row in report.drills if row.drill == event.drill)
    if row.incident:
        return  # the incident's entry contains it
    where = f" into attempt {event.attempt}" if event.attempt else ""
    state = "no incident has followed" if row.done else "not injected yet"
    fact = Fact(label="Drill", text=full(f"{drill(event.fault, event.arguments)}{where}; {state}"))
    yield entry_of(record, entry, f"drill {event.fault}", event.author, drill=event.drill, facts=(fact,))


def _alert(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.SignalRaised) -> _Found:
    if event.tier is not Tier.ALERT:
        return
    same = [row for row in report.incidents if incidents.preceded_by(row, event.step)]
    if any(row.attempt == event.attempt for row in same):
        return  # it became an incident, whose entry mentions the alert
    again = next((row for row in same if row.kind == event.signal and row.opened > entry.ts), None)
    measured, line = evidence(event.evidence)
    facts = (
        Fact(label="Evidence", text=f"{full(event.rule)} {full(measured)}", line=line),
        Fact(label="Decision", text=_UNSAVED if event.signal == AlertSignal.SAVE_FAILED else _not_acted_on(again)),
        *operators.notified(report, alert_id(record.lineage, event.key)),
    )
    what = f"alert, no action: {uncapitalized(title(event.signal))} at step {whole(event.step)}"
    yield entry_of(record, entry, what, run=record.state.attempts[event.attempt].run, facts=facts)


_UNSAVED = "Training continues, but all steps since the last saved checkpoint can be lost."


def _not_acted_on(again: IncidentReport | None) -> str:
    most = "An alert triggers no action, because most of them heal."
    if again is None:
        return f"{most} This one has not become an incident."
    return f"{most} This one recurred in attempt {again.attempt} and became {again.incident}."


def _refused(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.CheckpointRefused) -> _Found:
    point = event.checkpoint
    fact = Fact(label="Cause", text=f"{full(event.why)} No attempt will resume from it.")
    what = f"refused the checkpoint of step {whole(point.step)}: damaged"
    yield entry_of(record, entry, what, run=point.run, facts=(fact,))


def _size(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.SizeDecided) -> _Found:
    of = record.state.shape.nodes
    sizes = [(x.ts, x.event.nodes) for x in record.entries if isinstance(x.event, e.SizeDecided)]
    before = next((nodes for ts, nodes in reversed(sizes) if ts < entry.ts), of)
    until = next((ts for ts, _ in sizes if ts > entry.ts), float("inf"))
    grown = [i for i in record.state.incidents.values() if i.kind == FailureClass.NODES_RETURNED]
    if event.nodes > before and any(entry.ts <= i.opened_at < until for i in grown):
        return  # the move's own entry contains it
    facts = (Fact(label="Nodes", text=full(event.why)), Fact(label="Results", text=_SAME_BATCHES))
    verb = "shrank" if event.nodes < before else "growing"
    what = f"{verb} to {whole(event.nodes)} of {count(of, 'node')}"
    yield entry_of(record, entry, what, facts=facts, notable=True)


_SAME_BATCHES = "The global batch and the order of the data stay the same. Results agree to rounding, not bit for bit."


def _orphan_job(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.StrayFound) -> _Found:
    done = event.job not in record.state.orphan_jobs
    job = f"The job bears the name of allocation {event.allocation}, which does not account for it."
    text = f"{job} It {'was' if done else 'is being'} cancelled, so that it holds no nodes."
    what = f"{'cancelled' if done else 'found'} orphan job {short(event.job, 40)}"
    yield entry_of(record, entry, what, facts=(Fact(label="Cause", text=text),))


def _no_nodes(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.AllocationFailed) -> _Found:
    facts = (Fact(label="Cause", text=full(event.why)),)
    yield entry_of(record, entry, "the scheduler refused a request for nodes", facts=facts)


def _job(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.AllocationChanged) -> _Found:
    """One entry for all suspensions of a job: under gang scheduling, it may be stopped every minute."""
    if event.status is not AllocationStatus.SUSPENDED:
        return
    stops = (x for x in record.entries if _is_about(x.event, event.allocation) and x.event.status is event.status)
    if next(stops) is not entry:
        return
    later = [x for x in record.entries if x.seq >= entry.seq]
    states = [(x.ts, x.event.status) for x in later if _is_about(x.event, event.allocation)]
    ends = [*(at for at, _ in states[1:]), max(entry.ts, later[-1].ts)]
    times = [end - at for (at, status), end in zip(states, ends, strict=True) if status is event.status]
    lasts = states[-1][1] is event.status
    job = record.state.allocations[event.allocation].job or event.allocation
    text = f"{count(len(times), 'time')}, {duration(sum(times))} in all{'; it is suspended now' if lasts else ''}."
    fact = Fact(label="Suspended", text=f"{text} Its nodes stayed held, and nothing was trained meanwhile.")
    yield entry_of(record, entry, f"the scheduler suspended job {short(job, 40)}", facts=(fact,))


def _is_about(event: e.Event, allocation: str) -> TypeGuard[e.AllocationChanged]:
    if not isinstance(event, e.AllocationChanged) or event.status is AllocationStatus.UNKNOWN:
        return False
    return event.allocation == allocation


def _completed(record: LineageRecord, report: LineageReport, entry: e.Entry, event: e.LineageCompleted) -> _Found:
    spent = report.ledger
    text = f"All {whole(event.step)} steps in {duration(spent.wall_seconds)}, goodput {percent(spent.goodput)}."
    yield entry_of(record, entry, "completed", facts=(Fact(label="Result", text=text),), notable=True)


_RULES: dict[type[e.Event], Callable[[LineageRecord, LineageReport, e.Entry, Any], _Found]] = {
    **operators.RULES,
    e.LineageStarted: _started,
    e.DaemonStarted: _daemon,
    e.IncidentOpened: _incident,
    e.DrillRequested: _drill,
    e.SignalRaised: _alert,
    e.CheckpointRefused: _refused,
    e.AllocationFailed: _no_nodes,
    e.AllocationChanged: _job,
    e.SizeDecided: _size,
    e.StrayFound: _orphan_job,
    e.LineageCompleted: _completed,
    e.InputLeftOut: watch.left_out,
    e.WatcherFailed: watch.failed,
    e.WatcherRecovered: watch.recovered,
}
