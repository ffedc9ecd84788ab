"""The points that the curves show: all of the telemetry, thinned so that no peak is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from chronicles.kept_curve import AttemptCurve
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.validation import corpora, evaluated
from opt_ops.core.detect.point import Point
from opt_ops.runfolder.telemetry_curve import CurvePoint

Measure = Callable[[Point], float | None]

MEASURES: Mapping[str, Callable[[Point | CurvePoint], float | None]] = {
    "loss": lambda point: point.loss,
    "gnorm": lambda point: point.gnorm,
    "lr": lambda point: point.lr,
    "wps": lambda point: point.wps or None,
}

RUN_COLORS = 6  # the page defines --run-0 … --run-5; later runs use them again


def run_color(place: int) -> str:
    """The page's name for the colour of the run at this place in its lineage."""
    return f"run-{place % RUN_COLORS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A connected part of a curve; steps rise."""

    run: int  # the run's place in the lineage
    kept: bool
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureCurve:
    """One measure over all runs."""

    lines: Sequence[Line]
    gaps: Sequence[int]  # steps at which the value was not finite
    labels: Sequence[tuple[int, float, str]] = ()  # (step, value, name) at the ends of lines


def curve(record: LineageRecord, measure: str) -> MeasureCurve:
    """Every point of a measure that telemetry holds."""
    drawn = _curve(record, record.curves, MEASURES[measure])
    return replace(drawn, gaps=[]) if measure == "wps" else drawn  # where it is missing, nothing diverged


def validation(record: LineageRecord) -> MeasureCurve:
    """The loss on validation data, one line for each corpus. Several corpora have letters, as in the report."""
    names = corpora(record.curves)
    drawn = [_curve(record, evaluated(record.curves, name), _loss_on(name)) for name in names]
    ends = [next((line for line in reversed(one.lines) if line.kept), None) for one in drawn]
    labels = [
        (line.steps[-1], line.values[-1], letter(place))
        for place, line in enumerate(ends)
        if line is not None and len(names) > 1
    ]
    gaps = sorted({step for one in drawn for step in one.gaps})
    return MeasureCurve(lines=[line for one in drawn for line in one.lines], gaps=gaps, labels=labels)


def letter(place: int) -> str:
    """a, b, …, z, aa, ab, …: names a corpus in a drawing, where untrusted text must not appear."""
    more, last = divmod(place, 26)
    return (letter(more - 1) if more else "") + chr(ord("a") + last)


def _loss_on(corpus: str) -> Measure:
    return lambda point: (point.valid or {}).get(corpus)


def _curve(record: LineageRecord, curves: Sequence[AttemptCurve], of: Measure) -> MeasureCurve:
    runs = {name: place for place, name in enumerate(record.state.runs)}
    gaps = [point.step for each in curves for point in each.points if _number(of(point)) is None]
    return MeasureCurve(lines=list(_lines(curves, of, runs)), gaps=gaps)


def thinned(drawn: MeasureCurve, limit: int) -> MeasureCurve:
    """The curve in about `limit` points. Every line keeps at least its ends and its extremes."""
    total = sum(len(line.steps) for line in drawn.lines)
    if total <= limit:
        return drawn
    return replace(drawn, lines=[_thin(line, max(8, limit * len(line.steps) // total)) for line in drawn.lines])


def nodes(record: LineageRecord, report: LineageReport) -> MeasureCurve:
    """On how many nodes the kept updates were trained."""
    sizes = {attempt.attempt: len(attempt.nodes) for attempt in report.attempts}
    places = {name: place for place, name in enumerate(record.state.runs)}
    ends: dict[str, list[tuple[int, float]]] = {}
    before: tuple[int, float] | None = None
    for each in record.curves:
        kept = [point.step for point in each.points if each.is_kept(point)]
        if kept and (size := sizes.get(each.attempt)):
            known = ends.setdefault(each.run, [before] if before else [])
            known += [(kept[0], float(size)), (kept[-1], float(size))]
            before = known[-1]
    lines = [line for run, points in ends.items() for line in _line(places[run], True, points)]
    return MeasureCurve(lines=lines, gaps=[])


def thin(steps: Sequence[int], values: Sequence[float], limit: int) -> list[int]:
    """Which points of a line to draw: at most `limit` (4 or more), its ends and every bucket's lowest and highest.

    A line through them covers the same heights as one through all points, to within a bucket's width.
    """
    size = len(steps)
    if size <= limit:
        return list(range(size))
    buckets = (limit - 2) // 2
    chosen = {0, size - 1}
    for bucket in range(buckets):
        first, end = bucket * size // buckets, (bucket + 1) * size // buckets
        chosen.add(min(range(first, end), key=values.__getitem__))
        chosen.add(max(range(first, end), key=values.__getitem__))
    return sorted(chosen)


def _thin(line: Line, limit: int) -> Line:
    chosen = thin(line.steps, line.values, limit)
    return replace(line, steps=[line.steps[i] for i in chosen], values=[line.values[i] for i in chosen])


def _lines(curves: Sequence[AttemptCurve], of: Measure, runs: Mapping[str, int]) -> Iterator[Line]:
    """Kept lines are joined over the attempts of a run, discarded ones stand alone; both are broken at gaps."""
    kept: list[tuple[int, float]] = []  # of the present run
    run: int | None = None
    for each in curves:
        if runs[each.run] != run:
            yield from _line(run, True, kept)
            kept = kept[-1:]  # the next run's line begins where this one ends, so that a changed setting shows
            run = runs[each.run]
        lost: list[tuple[int, float]] = []
        for point in each.points:
            number = _number(of(point))
            is_kept = each.is_kept(point)
            if number is None:
                yield from _line(run, is_kept, kept if is_kept else lost)
                (kept if is_kept else lost).clear()
            elif is_kept:
                kept.append((point.step, number))
            else:
                lost = lost or kept[-1:]
                lost.append((point.step, number))
        yield from _line(run, False, lost)
    yield from _line(run, True, kept)


def _line(run: int | None, kept: bool, points: Sequence[tuple[int, float]]) -> Iterator[Line]:
    if run is not None and points:
        steps, values = zip(*points, strict=True)
        yield Line(run=run, kept=kept, steps=steps, values=values)


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
