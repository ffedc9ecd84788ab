"""The numbers behind the curves, for the page's script: values under the pointer, and a part drawn larger.

Only numbers and names of incidents, runs and attempts go in. A long run is thinned so that no peak is lost, and every
update near a named incident is there.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chronicles.logbook.drawing.anchors import slug
from chronicles.logbook.drawing.curves import RUN_COLORS, Line, MeasureCurve, thin
from chronicles.logbook.drawing.figure import Measured, extent
from chronicles.logbook.drawing.marks import IncidentMark
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport

BUCKETS = 2000  # of a measure: the lowest and the highest value of each is kept
AROUND = 300  # steps on both sides of a named incident with every update: what the button beside its entry shows
_TIMES = 24  # moments of an attempt, between which the script interpolates

_DIGITS = {"loss": 4, "valid": 4, "gnorm": 3, "lr": 5, "wps": 4, "nodes": 6}  # significant ones


def encode(record: LineageRecord, report: LineageReport, shown: Measured, placed: Sequence[IncidentMark]) -> str:
    """JSON for the script; empty without curves. docs/formats.md has its keys."""
    return encode_lines([run.run for run in report.runs], list(_attempts(record, report)), shown, placed)


def encode_lines(
    names: Sequence[str],
    attempts: Sequence[Sequence[Any]],
    shown: Measured,
    placed: Sequence[IncidentMark],
    beside: str = "",
) -> str:
    """The same for any lines, each of one of `names`; `beside` is what the axis counts where all names are read out."""
    if not shown.curves:
        return ""
    named = [mark.step for mark in placed if mark.named]
    first, last = extent(shown.curves)
    found: dict[str, Any] = {
        "first": first,
        "last": last,
        "runs": [slug(name) for name in names],
        "colors": RUN_COLORS,
        "attempts": attempts,
        "marks": [[slug(mark.incident), mark.step, mark.resumed, int(mark.quiet)] for mark in placed],
        "healthy": None if shown.healthy_wps is None else _number(shown.healthy_wps, 4),
        "lines": {measure: list(_lines(measure, drawn, named)) for measure, drawn in shown.curves.items()},
    }
    if beside:
        found["beside"] = beside
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _attempts(record: LineageRecord, report: LineageReport) -> Iterator[list[Any]]:
    """Of each attempt that trained: run, nodes, steps (each the difference to the one before), their seconds."""
    sizes: Mapping[str, int] = {each.attempt: len(each.nodes) for each in report.attempts}
    places = {run.run: place for place, run in enumerate(report.runs)}
    for each in record.curves:
        if each.points:
            chosen = sorted({round(i * (len(each.points) - 1) / _TIMES) for i in range(_TIMES + 1)})
            points = [each.points[i] for i in chosen]
            steps, times = [point.step for point in points], [round(point.ts) for point in points]
            yield [places.get(each.run, 0), sizes.get(each.attempt), _differences(steps), _differences(times)]


def _lines(measure: str, drawn: MeasureCurve, named: Sequence[int]) -> Iterator[list[Any]]:
    """Of each line: run, whether it is kept, its steps (each the difference to the one before), its values."""
    total = sum(len(line.steps) for line in drawn.lines)
    for line in drawn.lines:
        chosen = _chosen(line, max(8, 2 * BUCKETS * len(line.steps) // total), named)
        steps = [line.steps[i] for i in chosen]
        values = [_number(line.values[i], _DIGITS[measure]) for i in chosen]
        yield [line.run, int(line.kept), _differences(steps), values]


def _chosen(line: Line, limit: int, named: Sequence[int]) -> list[int]:
    chosen = set(thin(line.steps, line.values, limit))
    for step in named:
        chosen.update(range(bisect_left(line.steps, step - AROUND), bisect_right(line.steps, step + AROUND)))
    return sorted(chosen)


def _differences(values: Sequence[int]) -> list[int]:
    return [value - before for before, value in zip((0, *values), values, strict=False)]


def _number(value: float, digits: int) -> float | int:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
