"""How much of people's time a lineage took: an estimate from the journal, which knows requests and notes only.

A person is at work on a lineage from the first request or note after a page, or from a take-over, until the hand-back,
or until the last request that is followed by half an hour without one. The wait for an answer to a page is not work: it
is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from chronicles.operators import halts, operator_requests
from chronicles.record import LineageRecord
from opt_ops.core import events as e
from opt_ops.core.values import Driver, Severity

_PAUSE_SECONDS = 1800.0  # without a request: whoever made the last one is taken to have left


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """What people had to do. Seconds are estimates."""

    person_seconds: float
    seconds_waited: float  # from a page for a halt to its answer
    requests: int
    by_author: Mapping[str, int] = field(metadata={"key": ""})  # requests; no field of report.json


def people(record: LineageRecord, end: float) -> People:
    """What people had to do until `end`."""
    pages = sorted(pages_of(record, end))
    requests = operator_requests(record)
    return People(
        person_seconds=_union([*_after_pages(record, [at for at, _ in pages]), *_drives(record, end)]),
        seconds_waited=sum(answered - at for at, answered in pages),
        requests=len(requests),
        by_author=dict(sorted(Counter(request.author for request in requests).items())),
    )


def pages_of(record: LineageRecord, end: float) -> Iterator[tuple[float, float]]:
    """From when until when an operator was needed: halts until they were answered; other pages at their time only."""
    halted = halts(record)
    for halt in halted:
        yield float(halt.at), float(halt.answered) if halt.answered is not None else max(end, halt.at)
    of_halts = {halt.alert for halt in halted}
    for name, alert in record.state.alerts.items():
        if alert.told.severity is Severity.PAGE and name not in of_halts:
            yield alert.at, alert.at


def _after_pages(record: LineageRecord, pages: Sequence[float]) -> Iterator[tuple[float, float]]:
    """From the first thing that a person did after each page to the last one before a pause."""
    acts = [entry.ts for entry in record.entries if _is_of_a_person(entry.event)]
    for page, following in pairwise([*pages, float("inf")]):
        later = [ts for ts in acts if page <= ts]
        if not later or later[0] >= following:
            continue
        last = later[0]
        for ts in later:
            if ts - last > _PAUSE_SECONDS:
                break
            last = ts
        yield later[0], last


def _is_of_a_person(event: e.Event) -> bool:
    return bool(getattr(event, "author", None)) and not isinstance(event, e.LineageStarted)


def _drives(record: LineageRecord, end: float) -> Iterator[tuple[float, float]]:
    """From each take-over to the hand-back."""
    since: float | None = None
    for entry in record.entries:
        if isinstance(entry.event, e.DriverChanged):
            if since is not None:
                yield since, entry.ts
            since = entry.ts if entry.event.driver is Driver.OPERATOR else None
    if since is not None:
        yield since, max(since, end)


def _union(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
