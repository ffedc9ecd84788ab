"""Entries of allocations after the first. What replaces the nodes of an incident is in the incident's entry."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import count, full, names, short
from opt_ops.core import events as e
from opt_ops.core.state.model import Allocation

_AT_ONCE = 60.0  # seconds from an incident to the requests that it causes
_TOGETHER = 900.0  # seconds between requests for the same nodes
_NAMED = 8  # nodes, or jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Allocations that share an entry; `incident` excluded the nodes that they replace."""

    entries: tuple[e.Entry, ...]
    incident: str | None


def attached(record: LineageRecord, report: LineageReport, found: Sequence[LogEntry]) -> Iterator[LogEntry]:
    """The entries with the requests for nodes: as a fact of an incident's entry, or as entries of their own."""
    groups = _grouped(record, report, [entry.ts for entry in found])
    facts = {group.incident: _fact(record, report, group) for group in groups if group.incident}
    own = [_entry(record, report, group) for group in groups if not group.incident]
    for entry in found:
        while own and own[0].ts < entry.ts:
            yield own.pop(0)
        fact = facts.get(entry.anchor)
        yield replace(entry, facts=(*entry.facts, fact)) if fact else entry
    yield from own


def _grouped(record: LineageRecord, report: LineageReport, others: Sequence[float]) -> list[_Group]:
    """All allocations but the first, which belongs to the start. `others` are the times of all other entries."""
    submitted = [entry for entry in record.entries if isinstance(entry.event, e.AllocationSubmitted)][1:]
    found: list[_Group] = []
    for entry in submitted:
        last = found[-1] if found else None
        if last is not None and _continues(last.entries[-1].ts, entry.ts, others):
            found[-1] = replace(last, entries=(*last.entries, entry))
        else:
            found.append(_Group(entries=(entry,), incident=_replaces_incident(report, entry.ts)))
    return found


def _continues(before: float, now: float, others: Sequence[float]) -> bool:
    """Whether a request belongs to the one before: it came soon, and nothing else happened in between."""
    return now - before <= _TOGETHER and bisect(others, before) == bisect(others, now)


def _replaces_incident(report: LineageReport, ts: float) -> str | None:
    """The newest incident of the last minute that excluded nodes."""
    lost = (row for row in reversed(report.incidents) if row.excluded and not row.advisory)
    return next((row.incident for row in lost if 0 <= ts - row.opened <= _AT_ONCE), None)


def _entry(record: LineageRecord, report: LineageReport, group: _Group) -> LogEntry:
    jobs = _jobs(group)
    wanted = count(_nodes_wanted(report, _allocations(record, group)), "node")
    what = (
        f"requested {wanted}, job {short(jobs[0], 40)}" if len(jobs) == 1 else f"requested {wanted} in {len(jobs)} jobs"
    )
    return entry_of(record, group.entries[0], what, facts=(_fact(record, report, group),))


def _fact(record: LineageRecord, report: LineageReport, group: _Group) -> Fact:
    requested = _allocations(record, group)
    jobs = _jobs(group)
    of = f"as job {jobs[0]}" if len(jobs) == 1 else f"as jobs {names(jobs)}" if len(jobs) <= _NAMED else ""
    of = of or f"as {len(jobs)} jobs, {jobs[0]} to {jobs[-1]}"
    excluded = requested[0].exclude
    without = f" without {names(excluded)}" if excluded and len(excluded) <= _NAMED else ""
    text = f"{count(_nodes_wanted(report, requested), 'node')} requested{without}, {of}."
    why = next(each.why for each in report.allocations if each.allocation == requested[0].name)
    return Fact(label="Nodes", text=f"{text} {full(why)}" if why and not _COUNTED.fullmatch(why) else text)


_COUNTED = re.compile(r"\d+ of \d+ nodes are held, \d+ are asked for")
"""How the daemon counts before it asks. Beside what it then asked for, it reads as a contradiction."""


def _nodes_wanted(report: LineageReport, requested: Sequence[Allocation]) -> int:
    """For how many nodes the requests asked: one that was withdrawn does not count beside its successor."""
    gone = {each.allocation for each in report.allocations if each.ended is not None and each.started is None}
    kept = [each for each in requested if each.name not in gone] or requested[-1:]
    return sum(each.wanted for each in kept)


def _allocations(record: LineageRecord, group: _Group) -> list[Allocation]:
    return [record.state.allocations[_event(entry).allocation] for entry in group.entries]


def _jobs(group: _Group) -> list[str]:
    return [_event(entry).job for entry in group.entries]


def _event(entry: e.Entry) -> e.AllocationSubmitted:
    assert isinstance(entry.event, e.AllocationSubmitted)
    return entry.event
