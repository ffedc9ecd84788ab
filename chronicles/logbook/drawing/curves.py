"""Which points of the telemetry the curves show: everything that happened, thinned so that no peak is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from chronicles.kept_curve import AttemptCurve
from chronicles.record import LineageRecord
from chronicles.validation import corpora, evaluated
from opt_ops.core.detect.point import Point

Measure = Callable[[Point], float | None]

MEASURES: Mapping[str, Measure] = {
    "loss": lambda point: point.loss,
    "gnorm": lambda point: point.gnorm,
    "lr": lambda point: point.lr,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A stretch of one curve: steps rise."""

    run: int  # the run's place in the lineage, which is its colour
    kept: bool
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An incident on the step axis: where training stopped, and where it went on from."""

    incident: str
    step: int
    resumed: int | None
    quiet: bool  # nothing failed: a drill, a planned move, what a person asked for, mere advice


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One measure over all runs."""

    lines: Sequence[Line]
    gaps: Sequence[int]  # steps at which it was not finite
    labels: Sequence[tuple[int, float, str]] = ()  # at the ends of lines: step, value, and what to call them


def curve(record: LineageRecord, measure: str) -> Curve:
    """Every point of a measure that telemetry holds."""
    return _curve(record, record.curves, MEASURES[measure])


def validation(record: LineageRecord) -> Curve:
    """The loss on validation data, a line for each corpus; they are lettered as in the report where there are more."""
    names = corpora(record.curves)
    drawn = [_curve(record, evaluated(record.curves, name), _loss_on(name)) for name in names]
    ends = [next((line for line in reversed(one.lines) if line.kept), None) for one in drawn]
    labels = [
        (line.steps[-1], line.values[-1], letter(place))
        for place, line in enumerate(ends)
        if line is not None and len(names) > 1
    ]
    gaps = sorted({step for one in drawn for step in one.gaps})
    return Curve(lines=[line for one in drawn for line in one.lines], gaps=gaps, labels=labels)


def letter(place: int) -> str:
    """a, b, …, z, aa, ab, …: what a corpus is called where its name, which others chose, must not stand."""
    more, last = divmod(place, 26)
    return (letter(more - 1) if more else "") + chr(ord("a") + last)


def _loss_on(corpus: str) -> Measure:
    return lambda point: (point.valid or {}).get(corpus)


def _curve(record: LineageRecord, parts: Sequence[AttemptCurve], of: Measure) -> Curve:
    runs = {name: place for place, name in enumerate(record.state.runs)}
    gaps = [p.step for part in parts for p in part.points if _number(of(p)) is None]
    return Curve(lines=list(_lines(parts, of, runs)), gaps=gaps)


def thinned(drawn: Curve, limit: int) -> Curve:
    """The curve in about `limit` points; every line keeps at least its ends and its extremes."""
    total = sum(len(line.steps) for line in drawn.lines)
    if total <= limit:
        return drawn
    return replace(drawn, lines=[_thin(line, max(8, limit * len(line.steps) // total)) for line in drawn.lines])


def marks(report: Mapping[str, Any]) -> list[Mark]:
    """The incidents that can be placed on the step axis, in order."""
    return [
        Mark(
            incident=row["incident"],
            step=row["last_step"] if row["last_step"] is not None else row["step_failed"],
            resumed=row["step_resumed"],
            quiet=bool(row["drill"] or row["planned"] or row["advice"] or row["kind"] == "operator"),
        )
        for row in report["incidents"]
        if row["last_step"] is not None or row["step_failed"] is not None
    ]


def thin(steps: Sequence[int], values: Sequence[float], limit: int) -> list[int]:
    """Which points of a line to draw: at most `limit` (4 or more), its ends and every bucket's lowest and highest.

    A line drawn through them covers the same heights as one through all points, to within a bucket's width.
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


def _lines(parts: Sequence[AttemptCurve], of: Measure, runs: Mapping[str, int]) -> Iterator[Line]:
    """Kept lines joined over the attempts of a run; each one that was taken back by itself; both broken at gaps."""
    kept: list[tuple[int, float]] = []  # of the run that is being drawn
    run: int | None = None
    for part in parts:
        if runs[part.run] != run:
            yield from _line(run, True, kept)
            kept = kept[-1:]  # the next run's line begins where this one's ends, so that a changed setting shows
            run = runs[part.run]
        lost: list[tuple[int, float]] = []
        for point in part.points:
            number = _number(of(point))
            counts = part.is_kept(point)
            if number is None:
                yield from _line(run, counts, kept if counts else lost)
                (kept if counts else lost).clear()
            elif counts:
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
