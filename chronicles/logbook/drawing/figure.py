"""The curves of a lineage as SVG: its incidents above, one panel for each measure below, over one axis of steps.

Every colour is a CSS class of the page, so that one drawing serves a light and a dark page and print. Only numbers and
names of incidents go in: no untrusted text can be in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import quantiles

from chronicles.logbook.drawing.anchors import slug
from chronicles.logbook.drawing.curves import (
    RUN_COLORS,
    Line,
    MeasureCurve,
    curve,
    nodes,
    run_color,
    thinned,
    validation,
)
from chronicles.logbook.drawing.marks import IncidentMark
from chronicles.logbook.drawing.scale import Scale
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A drawing's measures in CSS pixels. It is shown at its own size, so that its text is as large as the page's."""

    name: str
    width: int
    points: int  # per panel, about
    left: int = 46
    right: int = 20  # half of the last step's label


SIZES = (
    Size(name="wide", width=820, points=1600),
    Size(name="middle", width=560, points=1000),
    Size(name="narrow", width=350, points=600, left=42),
)

_PANELS = {
    "loss": ("Loss, nats per token", 190),
    "valid": ("Validation loss, nats per token", 120),
    "gnorm": ("Gradient norm", 104),
    "lr": ("Learning rate", 104),
    "wps": ("Throughput, tokens per second", 84),
    "nodes": ("Nodes in training", 40),
}
_LABEL = "Loss, gradient norm, learning rate, throughput and nodes by step, and the loss on validation data where known"
_LANE, _LANES = 15, 4  # height and number of the lanes of the strip of incidents
_TICKS = 14  # height of the strip of ticks below the loss
_GAP, _FOOT = 34, 40  # above each panel, for its heading; below the last one, for the steps
_NAME = 34  # pixels for the name of an incident
_DOTS = 80  # with so few values, each is drawn as a dot: a line alone would hide how few there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the curves show: each measure by its name, and the healthy throughput in tokens per second."""

    curves: Mapping[str, MeasureCurve]
    healthy_wps: float | None


def measured(record: LineageRecord, report: LineageReport) -> Measured:
    """Every measure that is known, in the order of the panels; none before there is any telemetry."""
    curves = {measure: _measure(record, report, measure) for measure in _PANELS}
    if not curves["valid"].lines and not curves["valid"].gaps:
        del curves["valid"]
    if not any(value for line in curves["lr"].lines for value in line.values):
        del curves["lr"]  # not known: the log of a job that is only watched need not tell it
    for measure in ("gnorm", "wps"):
        if not curves[measure].lines and (curves["loss"].lines or measure == "wps"):
            del curves[measure]
    if not curves["nodes"].lines or "wps" not in curves:
        del curves["nodes"]
    if not any(drawn.lines or drawn.gaps for drawn in curves.values()):
        return Measured(curves={}, healthy_wps=None)
    return Measured(curves=curves, healthy_wps=_healthy(record, report))


def _measure(record: LineageRecord, report: LineageReport, measure: str) -> MeasureCurve:
    if measure == "nodes":
        return nodes(record, report)
    return validation(record) if measure == "valid" else curve(record, measure)


def _healthy(record: LineageRecord, report: LineageReport) -> float | None:
    """Tokens per second of a healthy step: the tokens of the newest update that tells them, by its seconds."""
    step = report.ledger.healthy_step_seconds
    points = (point for each in reversed(record.curves) for point in reversed(each.points))
    newest = next((point for point in points if point.wps and point.step_seconds), None)
    return newest.wps * newest.step_seconds / step if newest and step else None


def draw(shown: Measured, placed: Sequence[IncidentMark], axis: str = "step") -> list[str]:
    """The drawing in each of `SIZES`; none before there is any telemetry. `axis` is written below the lowest panel."""
    drawings: list[str] = []
    curves = shown.curves or {}
    for size in SIZES if curves else ():  # each from the one before: what was thinned once is quickly thinned again
        curves = {measure: thinned(drawn, size.points) for measure, drawn in curves.items()}
        drawings.append(_draw(Measured(curves=curves, healthy_wps=shown.healthy_wps), placed, size, axis))
    return drawings


def _draw(shown: Measured, placed: Sequence[IncidentMark], size: Size, axis: str) -> str:
    low, high = extent(shown.curves)
    x = Scale(low=low, high=high, pixels=size.width - size.left - size.right)
    named = [mark for mark in placed if mark.named]
    lanes = _lanes(named, x)
    strip = _LANE * (1 + max((lane for lane, _ in lanes), default=-1))
    parts = [f'<g class="names" transform="translate({size.left} 0)">', *_strip(named, lanes, strip, x), "</g>"]
    top = strip
    for measure, drawn in shown.curves.items():
        heading, tall = _PANELS[measure]
        top += _GAP
        parts.append(f'<g class="panel" data-measure="{measure}" data-tall="{tall}"')
        parts.append(f' transform="translate({size.left} {top})">')
        parts.append(f'<text class="heading" x="{2 - size.left}" y="-14">{heading}</text>')
        parts += _Panel(measure, drawn, x, tall, shown.healthy_wps).draw(named)
        top += tall
        if measure == "loss" and len(named) < len(placed):
            parts += [f'<g transform="translate(0 {tall + 4})">', *_ticks(placed, x), "</g>"]
            top += _TICKS
        parts.append("</g>")
    parts += [f'<g class="steps" transform="translate({size.left} {top})">', *_step_labels(x, size, axis), "</g>"]
    box = f'viewBox="0 0 {size.width} {top + _FOOT}" data-left="{size.left}" data-inner="{_n(x.pixels)}"'
    ends = f'data-first="{_n(low)}" data-last="{_n(high)}" data-strip="{strip}"'
    return f'<svg class="curves {size.name} plot" {box} {ends} role="img" aria-label="{_LABEL}">{"".join(parts)}</svg>'


def keys(svg: str) -> dict[str, bool]:
    """Which of the marks a drawing has, for its legend."""
    drawn = {name for names in re.findall(r' class="([^"]*)"', svg) for name in (names, names.split(" ")[-1])}
    return {name: name in drawn for name in ("gone", "at", "quiet", "back", "tick", "gap", "level")} | {
        "peak": '"peak ' in svg
    }


def extent(curves: Mapping[str, MeasureCurve]) -> tuple[int, int]:
    """The first and the last step on the axis."""
    steps = [step for drawn in curves.values() for line in drawn.lines for step in (line.steps[0], line.steps[-1])]
    steps += [step for drawn in curves.values() for step in drawn.gaps]
    return min(steps), max(*steps, min(steps) + 1)


def _ticks(placed: Sequence[IncidentMark], x: Scale) -> Iterator[str]:
    """A tick for every incident that has no name on the curves; each is a link to its entry."""
    yield f'<path class="axis" d="M0 8H{_n(x.pixels)}"/>'
    for mark in placed:
        if not mark.named:
            name = "tick quiet" if mark.quiet else "tick"
            at = f"M{_n(x(mark.step))} 0v8"
            hit = f'<path class="hit" d="{at}"><title>{mark.told}</title></path>'  # wide enough for a pointer
            yield f'<a href="#{slug(mark.incident)}"><path class="{name}" d="{at}"/>{hit}</a>'


def _step_labels(x: Scale, size: Size, axis: str) -> Iterator[str]:
    for step in x.ticks(max(4, size.width // 100), (1, 2, 2.5, 5), whole=True):
        yield f'<text x="{_n(x(step))}" y="17" text-anchor="middle">{step:,.0f}</text>'
    yield f'<text x="{_n(x.pixels / 2)}" y="33" text-anchor="middle">{axis}</text>'


# ---- a panel -----------------------------------------------------------------------------------------------------


class _Panel:
    """One measure over the steps."""

    def __init__(self, measure: str, drawn: MeasureCurve, x: Scale, tall: int, level: float | None) -> None:
        self._measure, self._drawn, self._x, self._tall = measure, drawn, x, tall
        self._level = level if measure == "wps" else None
        low, high = _whole(drawn) if measure == "nodes" else _heights(drawn, log=measure == "gnorm")
        if measure == "wps":
            low, high = 0.0, max(high, (self._level or 0.0) * 1.15)
        self._scale = Scale(low=low, high=high, pixels=tall, log=measure == "gnorm")

    def draw(self, placed: Sequence[IncidentMark]) -> Iterator[str]:
        """All of it, from back to front. What lies beyond the panel is cut off."""
        yield from self._values()
        yield f'<svg width="{_n(self._x.pixels)}" height="{self._tall}">'
        yield from self._incidents(placed)
        if self._level:
            height = _n(self._y(self._level))
            title = f"<title>{self._level:,.0f} tokens per second in a healthy step</title>"
            yield f'<path class="level" d="M0 {height}H{_n(self._x.pixels)}">{title}</path>'
        yield from self._lines()
        yield from self._peaks()
        top = _n(0.06 * self._tall - 3)
        for first, last in _runs(self._drawn.gaps):
            where = f"at step {first:,}" if first == last else f"from step {first:,} to {last:,}"
            cross = f"M{_n(self._x(first) - 3)} {top}l6 6m0-6l-6 6"
            yield f'<path class="gap" d="{cross}"><title>Not finite {where}</title></path>'
        yield "</svg>"
        yield from self._letters()

    def _y(self, value: float) -> float:
        return self._tall - self._scale(value)

    def _values(self) -> Iterator[str]:
        """The labelled values, with a line at each."""
        most = {"loss": 5, "valid": 4, "gnorm": 6, "nodes": 2}.get(self._measure, 3)
        for value in self._scale.ticks(most, whole=self._measure == "nodes"):
            text = rate(value) if self._measure == "lr" else _short(value)
            height = _n(self._y(value))
            yield f'<path class="grid" d="M0 {height}H{_n(self._x.pixels)}"/>'
            yield f'<text x="-6" y="{height}" dy="4" text-anchor="end">{text}</text>'

    def _incidents(self, placed: Sequence[IncidentMark]) -> Iterator[str]:
        for mark in placed:
            name = "at quiet" if mark.quiet else "at"
            at = f"M{_n(self._x(mark.step))} 0V{self._tall}"
            yield f'<path class="{name}" d="{at}"><title>{mark.told}</title></path>'

    def _lines(self) -> Iterator[str]:
        """One path for each colour. Kept lines are drawn last, above the discarded ones."""
        few = self._measure == "valid" and sum(len(line.steps) for line in self._drawn.lines) <= _DOTS
        for kept in (False, True):
            for place in range(RUN_COLORS):
                lines = [line for line in self._drawn.lines if line.kept is kept and line.run % RUN_COLORS == place]
                if not lines:
                    continue
                name = run_color(place) + ("" if kept else " gone")
                yield f'<path class="line {name}" d="{"".join(map(self._path, lines))}"/>'
                if few:
                    yield f'<path class="dots {name}" d="{"".join(map(self._dots, lines))}"/>'

    def _pixels(self, line: Line) -> Iterator[str]:
        return (f"{_n(self._x(s))} {_n(self._y(v))}" for s, v in zip(line.steps, line.values, strict=True))

    def _path(self, line: Line) -> str:
        # A line of one point has no length; with a round cap it is a dot.
        return "M" + " ".join(self._pixels(line)) + ("h0" if len(line.steps) == 1 else "")

    def _dots(self, line: Line) -> str:
        return "".join(f"M{pixel}h0" for pixel in self._pixels(line))

    def _peaks(self) -> Iterator[str]:
        """Peaks beyond the panel: a mark at its edge, and the value unless a higher one is written nearby."""
        written: list[float] = []
        for line in sorted(self._drawn.lines, key=lambda line: -max(line.values)):
            peak = max(line.values)
            if peak <= self._scale.high:
                return
            at = self._x(line.steps[line.values.index(peak)])
            title = f"<title>{peak:.4g} at step {line.steps[line.values.index(peak)]:,}</title>"
            yield f'<path class="peak {run_color(line.run)}" d="M{_n(at - 3)} 6h6l-3-5z">{title}</path>'
            if any(abs(at - other) < 48 for other in written):
                continue
            written.append(at)
            text = rate(peak) if self._measure == "lr" else f"{peak:.3g}"
            left = at > self._x.pixels - 48
            where = f'x="{_n(at - 7)}" text-anchor="end"' if left else f'x="{_n(at + 7)}"'
            yield f'<text {where} y="9">{text}</text>'

    def _letters(self) -> Iterator[str]:
        """Names at the ends of lines, moved down where they would overlap; skipped where there is no room left."""
        lowest = 0.0
        for step, value, name in sorted(self._drawn.labels, key=lambda label: -label[1]):
            lowest = max(self._y(value), lowest)
            if lowest > self._tall + 11:
                return
            yield f'<text class="letter" x="{_n(self._x(step) + 6)}" y="{_n(lowest)}" dy="4">{name}</text>'
            lowest += 11


def _runs(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each row of neighbouring steps."""
    ordered = sorted(set(steps))
    for _, row in groupby(enumerate(ordered), lambda item: item[1] - item[0]):
        found = [step for _, step in row]
        yield found[0], found[-1]


def _whole(drawn: MeasureCurve) -> tuple[float, float]:
    """The range of a number of nodes: its changes fill the panel, but one node more or less is not all of it."""
    values = [value for line in drawn.lines for value in line.values]
    low, high = min(values), max(values)
    room = max(1.0, 0.15 * (high - low))
    return low - room, high + room


def _short(value: float) -> str:
    """A labelled value: `0.5`, `200k`."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _heights(drawn: MeasureCurve, log: bool) -> tuple[float, float]:
    """The panel's range: all kept values, and of the discarded ones as much as keeps the rest readable.

    A few extreme points, such as the first steps of a long run or a drill's learning rate, would flatten all others.
    They are cut off, and marked at the edge.
    """
    kept = sorted(value for line in drawn.lines if line.kept for value in line.values)
    every = [value for line in drawn.lines for value in line.values]
    if not every:
        return (0.1, 10.0) if log else (0.0, 1.0)
    if log:
        return max(min(every), 1e-9) / 1.3, max(1e-9, *every) * 1.3
    kept = kept or sorted(every)
    low, high = kept[0], kept[-1]
    if len(kept) >= 40:
        inner = quantiles(kept, n=20)
        if high - low > 4 * (inner[-1] - inner[0]):
            high = min(high, inner[-1] + 1.5 * (inner[-1] - inner[0]))
    room = (high - low) or abs(high) or 1.0
    high = min(max(every), high + 0.35 * room)
    return min(every) - 0.06 * room, high + 0.08 * room


# ---- the strip of incidents --------------------------------------------------------------------------------------


def _lanes(placed: Sequence[IncidentMark], x: Scale) -> list[tuple[int, bool]]:
    """For each mark its lane in the strip, and whether there is room for its name. Names never overlap."""
    taken: list[list[tuple[float, float]]] = [[] for _ in range(_LANES)]
    found: list[tuple[int, bool]] = []
    for mark in placed:
        end = x(mark.step)
        start = x(min(mark.resumed, mark.step)) if mark.resumed is not None else end
        span = (start - _NAME - 8, end + 8) if end + _NAME > x.pixels else (start - 6, end + _NAME)
        free = next(
            (lane for lane, used in enumerate(taken) if all(b <= span[0] or a >= span[1] for a, b in used)), None
        )
        if free is None:
            found.append((_LANES - 1, False))
            continue
        taken[free].append(span)
        found.append((free, True))
    return found


def _strip(placed: Sequence[IncidentMark], lanes: Sequence[tuple[int, bool]], height: int, x: Scale) -> Iterator[str]:
    """The names of the incidents, each with a stem to the panels and a bracket over the steps that were discarded."""
    # Where there is no room for a name, the stem is short; the table of incidents has them all.
    tops = [_LANE * (lane + 0.5) if named else height - 0.3 * _LANE for lane, named in lanes]
    stems = "".join(f"M{_n(x(mark.step))} {_n(top)}V{height}" for mark, top in zip(placed, tops, strict=True))
    if stems:
        yield f'<path class="stem" d="{stems}"/>'
    for mark, (lane, named) in zip(placed, lanes, strict=True):
        if named:
            yield from _named(mark, _LANE * (lane + 0.5), x)


def _named(mark: IncidentMark, height: float, x: Scale) -> Iterator[str]:
    at, y = x(mark.step), _n(height)
    start = at
    if mark.resumed is not None:
        start = min(at, x(mark.resumed))
        if at - x(mark.resumed) > 6:
            yield f'<path class="back" d="M{_n(at)} {y}H{_n(start)}m4-3l-4 3l4 3"/>'
    yield f'<circle class="mark" cx="{_n(at)}" cy="{y}" r="2"><title>{mark.told}</title></circle>'
    left = x.pixels - at < _NAME
    where = f'x="{_n(start - 7)}" text-anchor="end"' if left else f'x="{_n(at + 7)}"'
    name = mark.incident.rsplit("-", 1)[-1]
    yield f'<a href="#{slug(mark.incident)}"><text {where} y="{y}" dy="4">{slug(name)}</text></a>'


def _n(pixels: float) -> str:
    """A coordinate to a tenth of a pixel."""
    text = f"{pixels:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
