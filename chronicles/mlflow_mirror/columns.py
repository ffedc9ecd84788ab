"""Numbers that make columns of MLflow's list of runs, and the marks of incidents on its curves. Pure.

Each value follows from what came before it. So a value that was sent stays right, whenever the next sync comes.
MLflow shows of each metric the value of the highest step. After a rollback, steps are lower than before: so values go
to the highest step so far, except the marks, which go to the steps of their incidents.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chronicles.kept_curve import AttemptCurve
from chronicles.ledger.legs import Leg, legs_of
from chronicles.mlflow_mirror.content import Sample, finite
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.core import events as e

POINTS = 10_000  # reports of a lineage that are sent, about: a page draws them, and a column is minutes old at most
_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The samples of one run of MLflow, in the order in which they came to be known."""

    progress: Sequence[Sample]
    marks: Sequence[Sample]


def columns(record: LineageRecord, report: LineageReport) -> dict[str, Columns]:
    """The samples of each run, by its name; those of the lineage's own run are at the empty name."""
    legs = legs_of(record.entries, record.state)
    progressed = {
        (entry.event.attempt, entry.event.step): entry.event
        for entry in record.entries
        if isinstance(entry.event, e.AttemptProgressed)
    }
    curves = {curve.attempt: curve for curve in record.curves}
    scales = {run.run: run.lr_scale for run in report.runs}
    every = max(1, math.ceil((report.total_steps or 0) / POINTS))
    parent = report.parent.step if report.parent else 0
    found: dict[str, Columns] = {}
    for name, start, since in [("", parent, report.started), *((r.run, r.from_step, r.planned) for r in report.runs)]:
        if since is not None:
            walk = _Walk(start, since, every, curves, progressed, scales)
            rows = [row for row in report.incidents if not name or (row.attempt or "").partition("-")[0] == name]
            marks = list(_marks(rows, start, since))
            if not name and report.ended is not None:
                marks += finite([("ops/goodput", report.ledger.goodput)], report.ended, _last_step(record))
            found[name] = Columns(progress=list(walk.over(legs, name)), marks=marks)
    return found


def _last_step(record: LineageRecord) -> int:
    return max((curve.points[-1].step for curve in record.curves if curve.points), default=0)


# ---- incidents ----


def _marks(rows: Sequence[IncidentReport], start: int, since: float) -> Iterator[Sample]:
    """1 at the step of each incident that touched training, 0 beside it; how many there were so far."""
    yield from finite([("ops/incidents", 0)], since, start)
    marked: set[tuple[str, int]] = set()
    number, highest = 0, start
    for row in sorted(rows, key=lambda row: (row.at, row.incident)):
        step = row.step_failed
        if step is None or not row.interrupts_training:
            continue
        number, highest = number + 1, max(highest, step)
        for key in ("ops/incident", *(("ops/drill",) if row.drill is not None else ())):
            yield from finite([(key, 1)], row.at, step)
            beside = [each for each in (step - 1, step + 1) if each >= 0 and (key, each) not in marked]
            for each in beside:
                yield from finite([(key, 0)], row.at, each)
            marked.add((key, step))
        yield from finite([("ops/incidents", number)], row.at, highest)


# ---- progress ----


@dataclass(slots=True)
class _Median:
    """The median of step times, each weighted by its number of steps, as the ledger takes it."""

    ranked: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    place: int = 0
    below: int = 0  # steps before that place
    total: int = 0

    def add(self, seconds: float, steps: int) -> None:
        place = bisect_right(self.ranked, (seconds, steps))
        self.ranked.insert(place, (seconds, steps))
        self.total += steps
        if place <= self.place and len(self.ranked) > 1:
            self.place, self.below = self.place + 1, self.below + steps
        while self.below + self.ranked[self.place][1] < self.total / 2:
            self.below += self.ranked[self.place][1]
            self.place += 1
        while self.place > 0 and self.below >= self.total / 2:
            self.place -= 1
            self.below -= self.ranked[self.place][1]

    @property
    def seconds(self) -> float | None:
        return self.ranked[self.place][0] if self.ranked else None


@dataclass(slots=True)
class _Walk:
    """Goes through all legs in order, and tells what one run of MLflow had come to at each report."""

    start: int
    since: float
    every: int
    curves: Mapping[str, AttemptCurve]
    progressed: Mapping[tuple[str, int], e.AttemptProgressed]
    scales: Mapping[str, float]
    position: int | None = None  # the newest update that is kept so far; None before the first one
    highest: int = 0
    sent: int = -1
    back: int = 0
    healthy: _Median = field(default_factory=_Median)
    evaluation: float = 0.0
    times: list[float] = field(default_factory=list[float])  # of the reports
    kept: list[int] = field(default_factory=list[int])  # steps, at these times

    def over(self, legs: Sequence[Leg], run: str) -> Iterator[Sample]:
        """The samples of `run`; of the whole lineage if that is empty."""
        for leg in legs:
            if not leg.reports:
                continue
            mine = not run or leg.attempt.run == run
            if self.position is not None and leg.start < self.position:
                self.back += self.position - leg.start
                self.position = leg.start
                if not mine:
                    yield from finite([("ops/steps_taken_back", self.back)], leg.reports[0][1], self.highest)
            if mine:
                yield from self._leg(leg)

    def _leg(self, leg: Leg) -> Iterator[Sample]:
        before: tuple[int, float] | None = None
        ended = leg.attempt.ended_at is not None
        for step, at in leg.reports:
            if before is not None:
                self._pace(leg, before, (step, at))
            before = (step, at)
            self.position, self.highest = step, max(self.highest, step)
            self.times.append(at)
            self.kept.append(step - self.start)
            last = ended and (step, at) == leg.reports[-1]
            if last or step // self.every != self.sent:
                self.sent = step // self.every
                yield from finite(self._values(leg, step, at).items(), at, self.highest)

    def _pace(self, leg: Leg, before: tuple[int, float], now: tuple[int, float]) -> None:
        event = self.progressed.get((leg.attempt.name, now[0]))
        steps = now[0] - before[0]
        known = event.step_seconds if event is not None else None
        self.healthy.add((now[1] - before[1]) / steps if known is None else known, steps)
        self.evaluation += event.evaluation_seconds if event is not None else 0.0

    def _values(self, leg: Leg, step: int, at: float) -> dict[str, float | None]:
        curve = self.curves[leg.attempt.name]
        place = bisect_left(curve.points, step, key=lambda point: point.step)
        point = curve.points[place] if place < len(curve.points) and curve.points[place].step == step else None
        return {
            "ops/step": step,
            "ops/loss": point.loss if point else None,
            "ops/lr_scale": self.scales[leg.attempt.run],
            "ops/nodes": len(leg.attempt.nodes),
            "ops/steps_taken_back": self.back,
            "ops/goodput": self._goodput(at, self.since),
            "ops/goodput_24h": self._goodput(at, max(self.since, at - _DAY)),
        }

    def _goodput(self, at: float, since: float) -> float | None:
        """As the ledger's, between two moments: kept steps × healthy step time ÷ wall clock."""
        seconds = self.healthy.seconds
        if seconds is None or at <= since:
            return None
        place = bisect_right(self.times, since)
        gained = self.kept[-1] - (self.kept[place - 1] if place else 0)
        return max(0, gained) * (seconds + self.evaluation / self.healthy.total) / (at - since)
