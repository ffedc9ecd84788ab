"""Every standstill of training between two steps: how long it lasted, what it discarded, which attempts it saw.

From the legs of the ledger, so that the seconds and steps of all stops together are the ledger's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from chronicles.ledger.legs import Leg, legs_of
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action

_RUNNING = (Status.TRAINING, Status.COMPLETED, Status.CANCELLED)


@dataclass(slots=True, kw_only=True)
class Stop:
    """From the last step before to the end of the first step after, however many attempts were launched meanwhile."""

    begin: float
    end: float  # of a stop that is not over: the newest entry of the journal
    over: bool
    before: str  # the attempt that had made the last step
    last_step: int
    resumed: int | None  # the step from which training continued
    steps_discarded: int = 0
    made_after: int = 0  # steps between it and the next stop
    attempts: list[str] = field(default_factory=list[str])  # launched meanwhile; the last one made a step

    @property
    def seconds(self) -> float:
        """How long training stood still."""
        return max(0.0, self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Stops:
    """All stops, oldest first, and which incident belongs to which."""

    all: Sequence[Stop]
    by_incident: Mapping[str, int]

    def at(self, ts: float) -> int | None:
        """The stop that a time is in."""
        place = bisect_left(self.all, ts, key=lambda stop: stop.end)  # stops follow each other
        return place if place < len(self.all) and self.all[place].begin <= ts <= self.all[place].end else None


def stops_of(record: LineageRecord, incidents: Sequence[IncidentReport]) -> Stops:
    """All stops of a lineage. What came before its first step is no stop."""
    known = legs_of(record.entries, record.state)
    stepped = [place for place, leg in enumerate(known) if leg.reports]
    found = [_stop(known, before, after) for before, after in pairwise(stepped)]
    if stepped and record.state.status not in _RUNNING:
        found.append(_open_stop(record, known, stepped[-1]))
    ends = {known[place].name: place for place in range(len(known))}
    for before in stepped:
        _discard(known, before, stepped, ends, found)
    places = _Places(known)
    by_incident: dict[str, int] = {}
    for row in incidents:
        own = places.of(row)
        stop = _following(own, stepped) if own is not None else None
        if stop is not None and stop < len(found):
            by_incident[row.incident] = stop
    return Stops(all=found, by_incident=by_incident)


def _stop(known: Sequence[Leg], before: int, after: int) -> Stop:
    hit, next_leg = known[before], known[after]
    last = hit.reports[-1][0]
    begin = next_leg.lost_at if next_leg.lost_at is not None else hit.reports[-1][1]
    return Stop(
        begin=begin,
        end=max(begin, next_leg.reports[0][1]),
        over=True,
        before=hit.attempt.name,
        last_step=last,
        resumed=next_leg.start,
        made_after=next_leg.reports[-1][0] - next_leg.start,
        attempts=[leg.attempt.name for leg in known[before + 1 : after + 1]],
    )


def _open_stop(record: LineageRecord, known: Sequence[Leg], before: int) -> Stop:
    step, at = known[before].reports[-1]
    return Stop(
        begin=at,
        end=max(at, record.entries[-1].ts),
        over=False,
        before=known[before].attempt.name,
        last_step=step,
        resumed=None,
        attempts=[leg.attempt.name for leg in known[before + 1 :]],
    )


def _discard(
    known: Sequence[Leg], place: int, stepped: Sequence[int], ends: Mapping[str, int], found: Sequence[Stop]
) -> None:
    """Count the steps of a leg that were discarded, each by the stop whose attempt went back behind it."""
    leg = known[place]
    first, last = leg.reports[0][0], leg.reports[-1][0] - leg.not_applied
    kept = min(last, leg.discarded[-1][0]) if leg.discarded else last
    kept = max(kept, first - 1)
    bounds = [(max(step, kept), by) for step, by in reversed(leg.discarded) if step < last]
    counted = 0
    for (begin, by), (end, _) in pairwise([*bounds, (last, "")]):
        if end > begin and (stop := _following(ends[by], stepped)) is not None and stop < len(found):
            found[stop].steps_discarded += end - begin
            counted += end - begin
    after = _following(place + 1, stepped)
    if leg.unseen_repeated > counted and after is not None and after < len(found):
        found[after].steps_discarded += leg.unseen_repeated - counted


def _following(place: int, stepped: Sequence[int]) -> int | None:
    """The stop that ends with the first leg from `place` on that made a step."""
    number = bisect_left(stepped, place)
    return number - 1 if number else None


class _Places:
    """Where a lineage's incidents stand among its legs."""

    def __init__(self, known: Sequence[Leg]) -> None:
        self._answers: dict[str, int] = {}  # by incident, the first leg that recovers from it
        self._first: dict[str, int] = {}  # by attempt
        self._last: dict[str, int] = {}
        for place, leg in enumerate(known):
            if leg.incident is not None:
                self._answers.setdefault(leg.incident, place)
            self._first.setdefault(leg.attempt.name, place)
            self._last[leg.attempt.name] = place

    def of(self, row: IncidentReport) -> int | None:
        """The leg that followed an incident; None if it did not stop training."""
        if row.advisory:
            return None
        if row.incident in self._answers:
            return self._answers[row.incident]
        if row.action not in (Action.HALT, Action.RESTART, Action.ROLLBACK, Action.RECONFIGURE):
            return None
        if row.next_attempt is not None:
            return self._first.get(row.next_attempt)
        last = self._last.get(row.attempt or "")
        return None if last is None else last + 1
