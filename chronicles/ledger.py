"""Where the time went: every second of a lineage's wall clock, in exactly one phase.

Goodput is kept steps × healthy step time ÷ wall clock. A phase is named for what the time bought: steps that count,
steps that were taken back, or none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from chronicles.record import Record
from chronicles.settled import Stretch
from opt_ops.core.run import State, Status
from opt_ops.core.values import Action


class Phase(StrEnum):
    """What a second was spent on."""

    KEPT = "training_kept"  # updates that count
    LOST = "training_lost"  # updates that were taken back, or not applied
    QUEUED = "queued"  # waiting for nodes
    STARTING = "starting"  # from the nodes to the first update, of the lineage or after a pause
    RECOVERING = "recovering"  # from an attempt's last update to the end of the next one's first
    PAUSED = "paused"  # by a person's wish
    HALTED = "halted"  # waiting for a human
    OTHER = "other"  # after the last update, with no incident open


@dataclass(slots=True)
class Ledger:
    """Seconds by phase; and by cause, an incident or a phase, what it cost in repeated steps and in standstill."""

    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    repeated: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    down: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps_kept: int = 0
    steps_repeated: int = 0
    healthy_step_seconds: float | None = None


class _Sweep:
    """A hand that goes over the wall clock once and never back, so that the phases must sum to the wall clock.

    Telemetry is stamped by rank 0's host, the journal by the daemon's: where the two disagree on the order of things,
    the time between them belongs to whichever came first here.
    """

    def __init__(self, record: Record, start: float, end: float) -> None:
        self._times = [ts for ts, _ in record.statuses]
        self._statuses = [status for _, status in record.statuses]
        self.now, self._end = start, end

    def to(self, ts: float) -> float:
        """Seconds from the hand to `ts`, where it stands then."""
        before, self.now = self.now, min(max(ts, self.now), self._end)
        return self.now - before

    def through(self, ts: float) -> Iterator[tuple[Status, float]]:
        """The same, divided where the status changed."""
        index = bisect_right(self._times, self.now) - 1
        while index + 1 < len(self._times) and self._times[index + 1] < ts:
            yield self._statuses[max(index, 0)], self.to(self._times[index + 1])
            index += 1
        yield self._statuses[max(index, 0)], self.to(ts)


def ledger(record: Record) -> Ledger:
    """Account for the time from the operator's request to the end, or to the newest sign of life."""
    book = Ledger()
    if record.started is None or record.as_of is None:
        return book
    sweep = _Sweep(record, record.started, record.as_of)
    state, steps = record.state, list[float]()
    before: Stretch | None = None
    for part in record.stretches:
        if not part.points:
            continue
        _stand_still(book, sweep, part.points[0].ts, _why_it_stood(state, part, before), before is not None)
        _train(book, sweep, part, state)
        steps += [point.step_seconds for point in part.points[1:] if part.counts(point)]
        before = part
    _stand_still(book, sweep, record.as_of, _open_incident(state), before is not None)
    book.healthy_step_seconds = median(steps) if steps else None
    return book


def _train(book: Ledger, sweep: _Sweep, part: Stretch, state: State) -> None:
    for point in part.points:
        seconds = sweep.to(point.ts)
        if part.counts(point):
            book.phases[Phase.KEPT] += seconds
            book.steps_kept += 1
            continue
        book.phases[Phase.LOST] += seconds
        book.steps_repeated += point.finite
        by = part.undone_by(point.step)
        book.repeated[(state.attempts[by].incident if by else None) or Phase.OTHER] += seconds


def _stand_still(book: Ledger, sweep: _Sweep, until: float, incident: str | None, stepped: bool) -> None:
    for status, seconds in sweep.through(until):
        phase = _phase(status, incident, stepped)
        book.phases[phase] += seconds
        book.down[incident if incident and phase is Phase.RECOVERING else phase] += seconds


def _phase(status: Status, incident: str | None, stepped: bool) -> Phase:
    match status:
        case Status.NEW | Status.PLANNED | Status.QUEUED:
            return Phase.QUEUED
        case Status.HALTED:
            return Phase.HALTED
        case Status.PAUSED:
            return Phase.PAUSED
        case Status.PREFLIGHT | Status.STARTING if not stepped or incident is None:
            return Phase.STARTING
        case Status.TRAINING | Status.COMPLETED | Status.CANCELLED if incident is None:
            return Phase.OTHER
        case _:
            return Phase.RECOVERING


def _why_it_stood(state: State, part: Stretch, before: Stretch | None) -> str | None:
    """The incident that a standstill belongs to: the attempt recovers from it, or it ended the one before.

    An attempt after a halt that an operator answered recovers from nothing: the answer has settled its incident.
    """
    named = state.attempts[part.attempt].incident
    if named is not None or before is None:
        return named
    hit = [i for i in state.incidents.values() if i.attempt == before.attempt and i.acted_on]
    return next((i.name for i in hit if i.decision and i.decision.action is Action.HALT), None)


def _open_incident(state: State) -> str | None:
    return next((i.name for i in reversed(list(state.incidents.values())) if i.closed_at is None), None)


def goodput(book: Ledger) -> float | None:
    """Kept steps × healthy step time ÷ wall clock; None before there are any."""
    wall = sum(book.phases.values())
    return book.steps_kept * book.healthy_step_seconds / wall if book.healthy_step_seconds and wall else None
