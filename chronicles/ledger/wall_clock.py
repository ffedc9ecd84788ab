"""Where the time, the nodes and the energy went, from the journal alone. docs/ledger.md defines every word and number.

This is the one place where goodput is computed. Every second of a lineage's wall clock is in exactly one phase, and
every lost one belongs to one cause and one stage of what was done about it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from chronicles.kept_curve import discards
from chronicles.record import LineageRecord
from opt_ops.core import events as e
from opt_ops.core.state.model import Attempt, Incident, State
from opt_ops.core.state.status import Status
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


class Stage(StrEnum):
    """How far the handling of what had happened was, in a lost second."""

    SEEING = "seeing"  # from the last update to the opened incident
    DECIDING = "deciding"
    ENDING = "ending"  # the processes of the attempt that was hit
    QUEUEING = "queueing"  # until the next attempt's ranks were ordered: waiting for nodes
    LOADING = "loading"  # from there to the end of the first update: start-up, reading the checkpoint
    REPEATING = "repeating"  # updates that were taken back, and had to be done again
    WAITING = "waiting"  # for people: paused or halted; or for nothing


_STAGES = {Phase.QUEUED: Stage.QUEUEING, Phase.STARTING: Stage.LOADING}

Lost = defaultdict[str, defaultdict[Stage, float]]


@dataclass(slots=True)
class Ledger:
    """Seconds by phase; lost seconds by cause (an incident, or a phase) and stage; and the steps behind them."""

    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost: Lost = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    steps_kept: int = 0
    steps_repeated: int = 0
    healthy_step_seconds: float | None = None  # scheduled evaluation included, saves not
    bare_step_seconds: float | None = None  # of the fastest twentieth of the steps, without evaluation
    seconds_saving: float = 0.0  # that saves held up training

    @property
    def wall(self) -> float:
        """From the operator's request to the end, or to the newest sign of life in the journal."""
        return sum(self.phases.values())

    @property
    def goodput(self) -> float | None:
        """Kept steps × healthy step time ÷ wall clock; None before there are any."""
        return self._share(self.healthy_step_seconds)

    def share_of_ideal(self, ideal_step_seconds: float | None = None) -> float | None:
        """Kept steps × ideal step time ÷ wall clock; the bare step's where no ideal is given."""
        return self._share(ideal_step_seconds or self.bare_step_seconds)

    @property
    def ettr(self) -> float | None:
        """Effective training time ratio: time in updates that count ÷ wall clock."""
        return self.phases[Phase.KEPT] / self.wall if self.steps_kept and self.wall else None

    def down(self, cause: str) -> float:
        """Standstill that a cause has cost."""
        return sum(seconds for stage, seconds in self.lost[cause].items() if stage is not Stage.REPEATING)

    def repeated(self, cause: str) -> float:
        """Training that a cause has taken back."""
        return self.lost[cause][Stage.REPEATING]

    def _share(self, step_seconds: float | None) -> float | None:
        return self.steps_kept * step_seconds / self.wall if step_seconds and self.wall else None


def ledger(record: LineageRecord) -> Ledger:
    """Account for the time from the operator's request to the end, or to the newest sign of life in the journal."""
    book, state = Ledger(), record.state
    if record.started is None:
        return book
    courses = _courses(record.entries, state)
    sweep = _Sweep(record.statuses, record.started, _end(record))
    paces: list[_Pace] = []
    before: _Course | None = None
    stepped = False
    for course in courses.values():
        attempt = course.attempt
        why = _why_it_stood(state, attempt, before)
        if course.knots:
            _stand_still(book, sweep, course.knots[0][1], _Cause(state, why, before), stepped)
            _train(book, sweep, course, state)
            paces += course.paces
            before, stepped = course, True
        elif attempt.ended_at is not None:  # it came to no step: what it took belongs to what it was to recover from
            _stand_still(book, sweep, attempt.ended_at, _Cause(state, why, before), stepped)
    _stand_still(book, sweep, sweep.end, _Cause(state, _open_incident(state), before), stepped)
    _step_times(book, paces)
    return book


# ---- the attempts' courses, as the journal tells them ----


@dataclass(slots=True)
class _Pace:
    """Steps in a row, and how long one of them usually took."""

    steps: int
    seconds: float
    evaluation: float


@dataclass(slots=True)
class _Course:
    """How far an attempt had come when: (step, time), both rising; and what became of it."""

    attempt: Attempt
    knots: list[tuple[int, float]]
    paces: list[_Pace]
    saving: float
    discarded: Sequence[tuple[int, str]]  # as in `chronicles.kept_curve`
    broken: int  # updates that were not applied: at most the last one

    def at(self, step: int) -> float:
        """When an update was complete; between two reports, as if all between them had taken as long."""
        place = bisect_left(self.knots, step, key=lambda knot: knot[0])
        after_step, after = self.knots[min(place, len(self.knots) - 1)]
        if place == 0 or place == len(self.knots) or after_step == step:
            return after
        before_step, before = self.knots[place - 1]
        return before + (after - before) * (step - before_step) / (after_step - before_step)


def _courses(entries: Sequence[e.Entry], state: State) -> dict[str, _Course]:
    discarded = discards({name: _start(attempt) for name, attempt in state.attempts.items()})
    broken = {(s.attempt, s.step) for s in state.signals.values() if s.signal == "non_finite_loss"}
    courses = {
        name: _Course(attempt, [], [], 0.0, discarded[name], int((name, attempt.last_step) in broken))
        for name, attempt in state.attempts.items()
    }
    for entry in entries:
        event = entry.event
        if isinstance(event, e.AttemptProgressed):
            course = courses[event.attempt]
            _reach(course, event.first_step, event.first_step_at)
            begun = course.knots[-1] if course.knots else (event.step, event.at)
            _reach(course, event.step, event.at)
            course.saving += event.save_seconds
            steps = event.step - begun[0]
            seconds = event.step_seconds
            if seconds is None and steps > 0:  # a journal from before this was written
                seconds = (event.at - begun[1]) / steps
            if seconds is not None and steps > 0:
                course.paces.append(_Pace(steps, seconds, event.evaluation_seconds))
        elif isinstance(event, e.AttemptEnded) and event.last_step is not None and event.last_step_at is not None:
            _reach(courses[event.attempt], event.last_step, event.last_step_at)
    return courses


def _reach(course: _Course, step: int, at: float) -> None:
    if not course.knots or step > course.knots[-1][0]:
        course.knots.append((step, max(at, course.knots[-1][1]) if course.knots else at))


def _start(attempt: Attempt) -> int:
    resumed = attempt.checkpoint.step if attempt.checkpoint else 0
    return min(resumed, attempt.first_step - 1) if attempt.first_step is not None else resumed


def _end(record: LineageRecord) -> float:
    """Nothing is said of the time since the last report of an attempt that trains."""
    state, attempt = record.state, record.state.attempt
    if state.ended:
        return state.since
    trains = state.status is Status.TRAINING and attempt is not None and _open_incident(state) is None
    seen = attempt.last_step_at if trains and attempt else None
    return max(seen or 0.0, state.started_at) if seen else record.entries[-1].ts


# ---- going over the wall clock ----


class _Sweep:
    """A hand that goes over the wall clock once and never back, so that the phases must sum to the wall clock.

    Steps are stamped by rank 0's host, the journal by the daemon's: where the two disagree on the order of things, the
    time between them belongs to whichever came first here.
    """

    def __init__(self, statuses: Sequence[tuple[float, Status]], start: float, end: float) -> None:
        self._times = [ts for ts, _ in statuses]
        self._statuses = [status for _, status in statuses]
        self.now, self.end = start, max(start, end)

    def to(self, ts: float) -> float:
        """Seconds from the hand to `ts`, where it stands then."""
        before, self.now = self.now, min(max(ts, self.now), self.end)
        return self.now - before

    def through(self, ts: float) -> Iterator[tuple[Status, float]]:
        """The time up to `ts` by status: until when each lasted."""
        index = bisect_right(self._times, self.now) - 1
        while index + 1 < len(self._times) and self._times[index + 1] < ts:
            yield self._statuses[max(index, 0)], self._times[index + 1]
            index += 1
        yield self._statuses[max(index, 0)], ts


class _Cause:
    """What a standstill belongs to, and how its stages follow each other."""

    def __init__(self, state: State, incident: str | None, before: _Course | None) -> None:
        self.incident = incident
        known = state.incidents.get(incident or "")
        self._marks = list(_marks(known, state, before.attempt if before else None)) if known else []

    def stages(self, start: float, end: float) -> Iterator[tuple[Stage, float]]:
        """The stages between two moments, each with its end."""
        stage = Stage.SEEING
        for follows, begins in self._marks:
            if start < begins < end:
                yield stage, begins
            if begins < end:
                stage = follows
        yield stage, end


def _marks(incident: Incident, state: State, hit: Attempt | None) -> Iterator[tuple[Stage, float]]:
    """When each stage began, in order; a stage whose beginning is not known has not begun."""
    following = state.attempts.get(incident.next_attempt or "")
    begins = [
        (Stage.DECIDING, incident.opened_at),
        (Stage.ENDING, incident.decided_at),
        (Stage.QUEUEING, hit.ended_at if hit and incident.decided_at is not None else None),
        (Stage.LOADING, following.intended_at if following else None),
    ]
    latest = 0.0
    for stage, at in begins:
        if at is not None:
            latest = max(latest, at)
            yield stage, latest


def _train(book: Ledger, sweep: _Sweep, course: _Course, state: State) -> None:
    """Divide the attempt's updates into those that count and those that others took back, each by who did."""
    first, last = course.knots[0][0], course.knots[-1][0]
    limit = course.discarded[-1][0] if course.discarded else last
    kept = min(last, limit)
    applied = last - course.broken
    if kept >= first:
        book.phases[Phase.KEPT] += sweep.to(course.at(min(kept, applied)))
        book.steps_kept += min(kept, applied) - first + 1
    book.seconds_saving += course.saving
    book.steps_repeated += max(0, applied - max(kept, first - 1))
    bounds = [(max(step, kept), by) for step, by in reversed(course.discarded) if step < last]
    ends = [*(step for step, _ in bounds[1:]), last]
    for (begin, by), end in zip(bounds, ends, strict=False):
        if end > begin:
            _repeat(book, sweep.to(course.at(end)), state.attempts[by].incident)
    _repeat(book, sweep.to(course.at(last)), None)  # an update that was not applied, and nothing has followed


def _repeat(book: Ledger, seconds: float, incident: str | None) -> None:
    book.phases[Phase.LOST] += seconds
    book.lost[incident or Phase.OTHER][Stage.REPEATING] += seconds


def _stand_still(book: Ledger, sweep: _Sweep, until: float, cause: _Cause, stepped: bool) -> None:
    for status, end in sweep.through(until):
        phase = _phase(status, cause.incident, stepped)
        if phase is not Phase.RECOVERING or cause.incident is None:
            seconds = sweep.to(end)
            book.phases[phase] += seconds
            book.lost[phase][_STAGES.get(phase, Stage.WAITING)] += seconds
            continue
        for stage, stage_end in cause.stages(sweep.now, end):
            seconds = sweep.to(stage_end)
            book.phases[phase] += seconds
            book.lost[cause.incident][stage] += seconds


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


def _why_it_stood(state: State, attempt: Attempt, before: _Course | None) -> str | None:
    """The incident that a standstill belongs to: the attempt recovers from it, or it ended the one before.

    An attempt after a halt that an operator answered recovers from nothing: the answer has settled its incident.
    """
    if attempt.incident is not None or before is None:
        return attempt.incident
    hit = [i for i in state.incidents.values() if i.attempt == before.attempt.name and i.acted_on]
    return next((i.name for i in hit if i.decision and i.decision.action is Action.HALT), None)


def _open_incident(state: State) -> str | None:
    return next((i.name for i in reversed(list(state.incidents.values())) if i.closed_at is None), None)


_FASTEST = 0.05  # of the steps: what the run itself has shown to be possible


def _step_times(book: Ledger, paces: Sequence[_Pace]) -> None:
    steps = sum(pace.steps for pace in paces)
    if not steps:
        return
    ranked = sorted(paces, key=lambda pace: pace.seconds)
    book.bare_step_seconds = _at_share(ranked, _FASTEST * steps)
    evaluation = sum(pace.evaluation for pace in paces) / steps
    book.healthy_step_seconds = _at_share(ranked, 0.5 * steps) + evaluation


def _at_share(ranked: Sequence[_Pace], share: float) -> float:
    passed = 0.0
    for pace in ranked:
        passed += pace.steps
        if passed >= share:
            return pace.seconds
    return ranked[-1].seconds
