"""Where the wall clock went: every second in one phase, every lost second with one cause and one stage of recovery.

Computed from the journal alone. No other module computes goodput. docs/ledger.md defines the terms.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from chronicles.ledger.legs import Leg, Pace, legs_of
from chronicles.record import LineageRecord
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action


class TimePhase(StrEnum):
    """What a second of the wall clock was spent on."""

    KEPT = "training_kept"  # updates that are kept
    LOST = "training_lost"  # updates that were discarded, or not applied
    QUEUED = "queued"  # waiting for nodes
    STARTING = "starting"  # from the nodes to the first update, of the lineage or after a pause
    RECOVERING = "recovering"  # from an attempt's last update to the end of the next one's first
    PAUSED = "paused"  # as an operator requested
    HALTED = "halted"  # waiting for an operator
    OTHER = "other"  # after the last update, with no incident open


class Stage(StrEnum):
    """The stage of a recovery that a lost second belongs to."""

    SEEING = "seeing"  # from the last update to the opened incident
    DECIDING = "deciding"
    ASKING = "asking"  # from the first proposal to the decision: waiting for a person's answer, or for its deadline
    ENDING = "ending"  # until the last process of the attempt has ended
    QUEUEING = "queueing"  # until the next attempt's ranks were ordered: waiting for nodes
    LOADING = "loading"  # from there to the end of the first update: start-up, reading the checkpoint
    REPEATING = "repeating"  # updates that were discarded and had to be repeated
    WAITING = "waiting"  # for an operator (paused or halted), or after the last update


_STAGES = {TimePhase.QUEUED: Stage.QUEUEING, TimePhase.STARTING: Stage.LOADING}


class Span(NamedTuple):
    """A part of the wall clock, and what it was spent on: an incident or a phase."""

    begin: float
    end: float
    cause: str


Lost = defaultdict[str, defaultdict[Stage, float]]


@dataclass(slots=True)
class Ledger:
    """Seconds by phase, lost seconds by cause (an incident or a phase) and stage, and the steps behind them."""

    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost: Lost = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    steps_kept: int = 0
    steps_repeated: int = 0
    healthy_step_seconds: float | None = None  # scheduled evaluation included, saves not
    bare_step_seconds: float | None = None  # of the fastest twentieth of the steps, without evaluation
    seconds_saving: float = 0.0  # that training waited for saves
    spans: list[Span] = field(default_factory=list["Span"])  # the wall clock in order, without gaps

    def spend(self, begin: float, end: float, phase: TimePhase, cause: str = "", stage: Stage | None = None) -> None:
        """Count the time between two moments to a phase and, where it is lost, to a cause and a stage."""
        self.phases[phase] += end - begin
        if stage is not None:
            self.lost[cause or phase][stage] += end - begin
        self.spans.append(Span(begin, end, cause or phase))

    @property
    def wall(self) -> float:
        """Seconds from the operator's request to the end, or to the newest report in the journal."""
        return sum(self.phases.values())

    @property
    def goodput(self) -> float | None:
        """Kept steps × healthy step time ÷ wall clock; None before there are any."""
        return self._share(self.healthy_step_seconds)

    def share_of_ideal(self, ideal_step_seconds: float | None = None) -> float | None:
        """Kept steps × ideal step time ÷ wall clock. Without an ideal, the bare step takes its place."""
        return self._share(ideal_step_seconds or self.bare_step_seconds)

    @property
    def ettr(self) -> float | None:
        """Effective training time ratio: time in kept updates ÷ wall clock."""
        return self.phases[TimePhase.KEPT] / self.wall if self.steps_kept and self.wall else None

    def downtime(self, cause: str) -> float:
        """Seconds without training that a cause has cost."""
        return sum(seconds for stage, seconds in self.lost[cause].items() if stage is not Stage.REPEATING)

    def repeated(self, cause: str) -> float:
        """Seconds of training that a cause has discarded."""
        return self.lost[cause][Stage.REPEATING]

    def _share(self, step_seconds: float | None) -> float | None:
        return self.steps_kept * step_seconds / self.wall if step_seconds and self.wall else None


def ledger(record: LineageRecord) -> Ledger:
    """Divide the time from the operator's request to the end, or to the newest report in the journal."""
    book, state = Ledger(), record.state
    if record.started is None:
        return book
    cursor = _TimeCursor(record.statuses, record.started, _end(record))
    paces: list[Pace] = []
    before: Leg | None = None
    stepped = False
    legs = legs_of(record.entries, state)
    for leg in legs:
        cause = _DowntimeCause(state, _cause_of_downtime(state, leg, before), before)
        if leg.reports:
            if leg.lost_at is not None and leg.incident is not None:  # the step in flight when ranks were lost
                _add_discarded(book, *cursor.to(min(leg.lost_at, leg.reports[0][1])), leg.incident)
            _add_downtime(book, cursor, leg.reports[0][1], cause, stepped)
            _add_training(book, cursor, leg, {each.name: each.incident for each in legs})
            paces += leg.paces
            before, stepped = leg, True
        elif leg.ended_at is not None:  # it made no step: its time belongs to what it should have recovered from
            _add_downtime(book, cursor, leg.ended_at, cause, stepped)
    _add_downtime(book, cursor, cursor.end, _DowntimeCause(state, _open_incident(state), before), stepped)
    _set_step_times(book, paces)
    return book


def _end(record: LineageRecord) -> float:
    """The time since the last report of an attempt that trains is in no phase: nothing is known of it yet."""
    state, attempt = record.state, record.state.attempt
    if state.ended:
        return state.since
    trains = state.status is Status.TRAINING and attempt is not None and _open_incident(state) is None
    seen = attempt.last_step_at if trains and attempt else None
    return max(seen or 0.0, state.started_at) if seen else record.entries[-1].ts


# ---- the walk over the wall clock ----


class _TimeCursor:
    """Walks over the wall clock once and never back, so that the phases sum to the wall clock.

    Rank 0's host stamps the steps, the daemon's host stamps the journal. Where their clocks disagree on the order of
    two events, the time between them belongs to the event that is taken first.
    """

    def __init__(self, statuses: Sequence[tuple[float, Status]], start: float, end: float) -> None:
        self._times = [ts for ts, _ in statuses]
        self._statuses = [status for _, status in statuses]
        self.now, self.end = start, max(start, end)

    def to(self, ts: float) -> tuple[float, float]:
        """Move to `ts`; return from when to when the time that was passed over lasted."""
        before, self.now = self.now, min(max(ts, self.now), self.end)
        return before, self.now

    def through(self, ts: float) -> Iterator[tuple[Status, float]]:
        """The time up to `ts` by status: (status, until when it lasted)."""
        index = bisect_right(self._times, self.now) - 1
        while index + 1 < len(self._times) and self._times[index + 1] < ts:
            yield self._statuses[max(index, 0)], self._times[index + 1]
            index += 1
        yield self._statuses[max(index, 0)], ts


class _DowntimeCause:
    """The incident that downtime belongs to, if any, and the stages of its recovery."""

    def __init__(self, state: State, incident: str | None, before: Leg | None) -> None:
        self.incident = incident
        known = state.incidents.get(incident or "")
        self._begins = list(_stage_begins(known, state, before.attempt if before else None)) if known else []

    def stages(self, start: float, end: float) -> Iterator[tuple[Stage, float]]:
        """The stages between two times, each with its end."""
        stage = Stage.SEEING
        for follows, begins in self._begins:
            if start < begins < end:
                yield stage, begins
            if begins < end:
                stage = follows
        yield stage, end


def _stage_begins(incident: Incident, state: State, hit: Attempt | None) -> Iterator[tuple[Stage, float]]:
    """When each stage began, in order. A stage whose beginning is not known has not begun."""
    following = state.attempts.get(incident.next_attempt or "")
    begins = [
        (Stage.DECIDING, incident.opened_at),
        (Stage.ASKING, incident.proposals[0].at if incident.proposals else None),
        (Stage.ENDING, incident.decided_at),
        (Stage.QUEUEING, hit.ended_at if hit and incident.decided_at is not None else None),
        (Stage.LOADING, following.intended_at if following else None),
    ]
    if in_place.joined(state, incident) is not None:  # nothing had to end
        begins[2:] = [(Stage.LOADING, in_place.replacements(state, incident)[0].intended_at)]
    latest = 0.0
    for stage, at in begins:
        if at is not None:
            latest = max(latest, at)
            yield stage, latest


def _add_training(book: Ledger, cursor: _TimeCursor, progress: Leg, incidents: Mapping[str, str | None]) -> None:
    """Divide the updates of a leg into kept ones and discarded ones, these by the incident that discarded them."""
    first, last = progress.reports[0][0], progress.reports[-1][0]
    limit = progress.discarded[-1][0] if progress.discarded else last
    kept = min(last, limit)
    applied = last - progress.not_applied
    if kept >= first:
        book.spend(*cursor.to(progress.at(min(kept, applied))), TimePhase.KEPT)
        book.steps_kept += min(kept, applied) - first + 1
    book.seconds_saving += progress.saving
    book.steps_repeated += max(progress.unseen_repeated, applied - max(kept, first - 1))
    bounds = [(max(step, kept), by) for step, by in reversed(progress.discarded) if step < last]
    ends = [*(step for step, _ in bounds[1:]), last]
    for (begin, by), end in zip(bounds, ends, strict=False):
        if end > begin:
            _add_discarded(book, *cursor.to(progress.at(end)), incidents[by])
    _add_discarded(book, *cursor.to(progress.at(last)), None)  # not applied, and no attempt has followed


def _add_discarded(book: Ledger, begin: float, end: float, incident: str | None) -> None:
    book.spend(begin, end, TimePhase.LOST, incident or TimePhase.OTHER, Stage.REPEATING)


def _add_downtime(book: Ledger, cursor: _TimeCursor, until: float, cause: _DowntimeCause, stepped: bool) -> None:
    """The time up to `until`. `stepped`: whether the lineage had made a step before."""
    for status, end in cursor.through(until):
        phase = _phase(status, cause.incident, stepped)
        if phase is not TimePhase.RECOVERING or cause.incident is None:
            book.spend(*cursor.to(end), phase, stage=_STAGES.get(phase, Stage.WAITING))
            continue
        for stage, stage_end in cause.stages(cursor.now, end):
            book.spend(*cursor.to(stage_end), phase, cause.incident, stage)


def _phase(status: Status, incident: str | None, stepped: bool) -> TimePhase:
    match status:
        case Status.NEW | Status.PLANNED | Status.QUEUED:
            return TimePhase.QUEUED
        case Status.HALTED:
            return TimePhase.HALTED
        case Status.PAUSED:
            return TimePhase.PAUSED
        case Status.PREFLIGHT | Status.STARTING if not stepped or incident is None:
            return TimePhase.STARTING
        case Status.TRAINING | Status.COMPLETED | Status.CANCELLED if incident is None:
            return TimePhase.OTHER
        case _:
            return TimePhase.RECOVERING


def _cause_of_downtime(state: State, leg: Leg, before: Leg | None) -> str | None:
    """The incident behind the downtime before a leg: the leg recovers from it, or it ended the one before.

    An attempt after a halt recovers from no incident: the operator's answer has closed it.
    """
    if leg.incident is not None or before is None:
        return leg.incident
    hit = [i for i in state.incidents.values() if i.attempt == before.attempt.name and i.acted_on]
    return next((i.name for i in hit if i.decision and i.decision.action is Action.HALT), None)


def _open_incident(state: State) -> str | None:
    return next((i.name for i in reversed(list(state.incidents.values())) if i.closed_at is None), None)


_FASTEST = 0.05  # of the steps: the lineage itself has shown that this pace is possible


def _set_step_times(book: Ledger, paces: Sequence[Pace]) -> None:
    steps = sum(pace.steps for pace in paces)
    if not steps:
        return
    ranked = sorted(paces, key=lambda pace: pace.seconds)
    book.bare_step_seconds = _at_share(ranked, _FASTEST * steps)
    evaluation = sum(pace.evaluation for pace in paces) / steps
    book.healthy_step_seconds = _at_share(ranked, 0.5 * steps) + evaluation


def _at_share(ranked: Sequence[Pace], share: float) -> float:
    passed = 0.0
    for pace in ranked:
        passed += pace.steps
        if passed >= share:
            return pace.seconds
    return ranked[-1].seconds
