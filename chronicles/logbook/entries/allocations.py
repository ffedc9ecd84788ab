"""Allocations after the first: told by the incident that they make good, and those of one moment in one entry."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.record import LineageRecord
from chronicles.wording import count, full, names, short
from opt_ops.core import events as e
from opt_ops.core.text import from_iso

_AT_ONCE = 60.0  # seconds from an incident to what is asked for because of it
_TOGETHER = 900.0  # seconds between requests that go on asking for the same nodes
_NAMED = 8  # nodes, or jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Allocations that one entry tells of; `incident` took the nodes out that they are to replace."""

    entries: tuple[e.Entry, ...]
    incident: str | None


def grouped(record: LineageRecord, report: Mapping[str, Any], others: Sequence[float]) -> list[Group]:
    """All allocations but the first, which belongs to the start. `others` are the times of all other entries."""
    submitted = [entry for entry in record.entries if isinstance(entry.event, e.AllocationSubmitted)][1:]
    found: list[Group] = []
    for entry in submitted:
        last = found[-1] if found else None
        if last is not None and _goes_on(last.entries[-1].ts, entry.ts, others):
            found[-1] = replace(last, entries=(*last.entries, entry))
        else:
            found.append(Group(entries=(entry,), incident=_made_good(report, entry.ts)))
    return found


def _goes_on(before: float, now: float, others: Sequence[float]) -> bool:
    """Whether a request goes on with the one before: soon, and nothing else has happened."""
    return now - before <= _TOGETHER and bisect(others, before) == bisect(others, now)


def _made_good(report: Mapping[str, Any], ts: float) -> str | None:
    """The newest incident of the minute before that took nodes out."""
    lost = (row for row in reversed(report["incidents"]) if row["excluded"] and not row["advice"])
    return next((row["incident"] for row in lost if 0 <= ts - from_iso(row["opened"]) <= _AT_ONCE), None)


def attached(record: LineageRecord, report: Mapping[str, Any], found: Sequence[LogEntry]) -> Iterator[LogEntry]:
    """The entries with what was asked for: as a fact of an incident's, or as entries of their own, in order."""
    groups = grouped(record, report, [entry.ts for entry in found])
    facts = {group.incident: _fact(record, report, group) for group in groups if group.incident}
    own = [_entry(record, report, group) for group in groups if not group.incident]
    for entry in found:
        while own and own[0].ts < entry.ts:
            yield own.pop(0)
        fact = facts.get(entry.anchor)
        yield replace(entry, facts=(*entry.facts, fact)) if fact else entry
    yield from own


def _entry(record: LineageRecord, report: Mapping[str, Any], group: Group) -> LogEntry:
    jobs = _jobs(group)
    what = f"new allocation, job {short(jobs[0], 40)}" if len(jobs) == 1 else f"{len(jobs)} new allocations"
    return entry_of(record, group.entries[0], what, facts=(_fact(record, report, group),))


def _fact(record: LineageRecord, report: Mapping[str, Any], group: Group) -> Fact:
    asked = [record.state.allocations[_event(entry).allocation] for entry in group.entries]
    jobs = _jobs(group)
    of = f"as job {jobs[0]}" if len(jobs) == 1 else f"as jobs {names(jobs)}" if len(jobs) <= _NAMED else ""
    of = of or f"as {len(jobs)} jobs, {jobs[0]} to {jobs[-1]}"
    left_out = asked[0].exclude
    without = f" without {names(left_out)}" if left_out and len(left_out) <= _NAMED else ""
    text = f"{count(sum(each.wanted for each in asked), 'node')} asked for{without}, {of}."
    why = next(row["why"] for row in report["allocations"] if row["allocation"] == asked[0].name)
    return Fact(label="Nodes", text=f"{text} {full(why)}" if why else text)


def _jobs(group: Group) -> list[str]:
    return [_event(entry).job for entry in group.entries]


def _event(entry: e.Entry) -> e.AllocationSubmitted:
    assert isinstance(entry.event, e.AllocationSubmitted)
    return entry.event
