"""The legs of a lineage: stretches of training without a standstill, with how far each had come when.

An attempt is one leg, and each replacement of ranks in place begins another. Computed from the journal's reports alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from chronicles.kept_curve import discards
from opt_ops.core import events as e
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.model import Incident, State


@dataclass(slots=True)
class Pace:
    """Consecutive steps, and the median seconds of one of them."""

    steps: int
    seconds: float
    evaluation: float  # seconds, of all steps together


@dataclass(slots=True, kw_only=True)
class Leg:
    """When a leg had reached which step, and which of its steps are discarded."""

    name: str  # of the attempt, with the generation from the second one on
    attempt: Attempt
    incident: str | None  # that it recovers from
    start: int  # the step whose state it began with
    lost_at: float | None = None  # when ranks were lost that were replaced at its beginning
    ended_at: float | None = None
    unseen_repeated: int = 0  # updates that telemetry never had, and that the next leg made again
    not_applied: int = 0  # updates that were not applied: at most the last one
    reports: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])  # (step, time), both rise
    paces: list[Pace] = field(default_factory=list[Pace])
    saving: float = 0.0
    discarded: Sequence[tuple[int, str]] = ()  # as in `chronicles.kept_curve`, by leg

    def at(self, step: int) -> float:
        """When an update was complete. Between two reports, all steps are taken to have been equally long."""
        place = bisect_left(self.reports, step, key=lambda report: report[0])
        after_step, after = self.reports[min(place, len(self.reports) - 1)]
        if place == 0 or place == len(self.reports) or after_step == step:
            return after
        before_step, before = self.reports[place - 1]
        return before + (after - before) * (step - before_step) / (after_step - before_step)

    def reach(self, step: int, at: float) -> None:
        """Take a report, if it is of a later step than the ones before."""
        if not self.reports or step > self.reports[-1][0]:
            self.reports.append((step, max(at, self.reports[-1][1]) if self.reports else at))


def legs_of(entries: Sequence[e.Entry], state: State) -> list[Leg]:
    """All legs, in order."""
    found = {name: _legs(state, attempt) for name, attempt in state.attempts.items()}
    not_applied = {(s.attempt, s.step) for s in state.signals.values() if s.signal == FailureClass.NON_FINITE_LOSS}
    for entry in entries:
        event = entry.event
        if isinstance(event, e.AttemptProgressed):
            _take(_leg_of(found[event.attempt], event.step), event)
        elif isinstance(event, e.AttemptEnded) and event.last_step is not None and event.last_step_at is not None:
            _leg_of(found[event.attempt], event.last_step).reach(event.last_step, event.last_step_at)
    for legs in found.values():
        legs[-1].not_applied = int((legs[-1].attempt.name, legs[-1].attempt.last_step) in not_applied)
        for before, after in pairwise(legs):
            if before.reports and before.reports[-1][0] < after.start:  # it was made, and told when ranks had joined
                before.reach(after.start, after.lost_at or before.reports[-1][1])
    known = [leg for legs in found.values() for leg in legs]
    discarded = discards({leg.name: leg.start for leg in known})
    for leg in known:
        leg.discarded = discarded[leg.name]
    return known


def _legs(state: State, attempt: Attempt) -> list[Leg]:
    first = Leg(name=attempt.name, attempt=attempt, incident=attempt.incident, start=_start(attempt))
    legs = [first]
    for members in attempt.members:
        if members.step is None or members.first_step is None or members.first_step_at is None:
            continue  # it made no step: the time belongs to what came before and after
        legs[-1].unseen_repeated = members.repeated or 0
        incident = state.incidents.get(members.incident or "")
        leg = Leg(
            name=f"{attempt.name}/{members.generation}",
            attempt=attempt,
            incident=members.incident,
            start=members.step,
            lost_at=_lost_at(incident, members),
        )
        leg.reach(members.first_step, members.first_step_at)
        legs.append(leg)
    legs[-1].ended_at = attempt.ended_at
    return legs


def _lost_at(incident: Incident | None, members: Members) -> float | None:
    """When the ranks were lost: what came before was the step in flight, what follows is standstill."""
    if incident is None or members.first_step_at is None:
        return None
    known = incident.closed_at is not None and incident.seconds_down is not None
    return members.first_step_at - (incident.seconds_down or 0.0) if known else incident.at


def _leg_of(legs: Sequence[Leg], step: int) -> Leg:
    """The newest leg that had begun when a report of this step was made."""
    return next((leg for leg in reversed(legs) if leg.start < step), legs[0])


def _take(leg: Leg, event: e.AttemptProgressed) -> None:
    if leg.name == leg.attempt.name:  # of a later leg, the first step is known already
        leg.reach(event.first_step, event.first_step_at)
    before_step, before = leg.reports[-1] if leg.reports else (event.step, event.at)
    leg.reach(event.step, event.at)
    leg.saving += event.save_seconds
    steps = event.step - before_step
    seconds = event.step_seconds
    if seconds is None and steps > 0:  # journals of earlier versions have no step times
        seconds = (event.at - before) / steps
    if seconds is not None and steps > 0:
        leg.paces.append(Pace(steps, seconds, event.evaluation_seconds))


def _start(attempt: Attempt) -> int:
    resumed = attempt.checkpoint.step if attempt.checkpoint else 0
    return min(resumed, attempt.first_step - 1) if attempt.first_step is not None else resumed
