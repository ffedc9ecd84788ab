"""The comparison as a page: one file in the logbook's style, with the same script for its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from chronicles.comparison.build import Comparison
from chronicles.comparison.words import ABOUT_SCORES, cost_rows, head, plain, score_rows, verdict
from chronicles.logbook.drawing import curve_data, figure
from chronicles.logbook.drawing.curves import MEASURES, Line, MeasureCurve
from chronicles.logbook.drawing.figure import Measured
from chronicles.logbook.drawing.html import ours, page_environment, page_part, policy
from chronicles.logbook.drawing.marks import IncidentMark
from chronicles.logbook.drawing.scale import axis_unit
from opt_ops.runfolder.telemetry_curve import CurvePoint


def page(compared: Comparison) -> str:
    """The HTML of a comparison. jinja2 escapes all untrusted text."""
    unit, axis = _axis(compared)
    shown = Measured(curves=_measures(compared, unit), healthy_wps=None)
    placed = _fork_mark(compared, unit)
    figures = figure.draw(shown, placed, axis) if any(each.lines for each in shown.curves.values()) else []
    names = compared.lineages
    script = page_part("curves.js")
    environment = page_environment({name: place for place, name in enumerate(names)})
    environment.filters["plain"] = plain
    return environment.get_template("compare.html").render(
        names=names,
        compared=compared,
        head=head(compared),
        verdict=verdict(compared),
        kinds=sorted({kind for each in compared.incidents for kind in each.by_kind}),
        scores=list(score_rows(compared)),
        about_scores=ABOUT_SCORES,
        costs=cost_rows(compared),
        axis=axis,
        css=ours(page_part("logbook.css")),
        script=ours(script),
        policy=policy([script]),
        curves=[ours(svg) for svg in figures],
        data=ours(curve_data.encode_lines(names, [], shown, placed, axis) if figures else ""),
    )


def _axis(compared: Comparison) -> tuple[int, str]:
    """By how much a place on the axis is divided, and what it counts then."""
    if compared.axis == "step":
        return 1, "step"
    most = max((point.tokens for points in compared.points for point in points), default=0)
    return axis_unit(most, "tokens")


def _measures(compared: Comparison, unit: int) -> Mapping[str, MeasureCurve]:
    """The panels that both lineages, or one of them, have values for."""
    panels = {name: list(_lines(compared, of, unit)) for name, of in MEASURES.items()}
    return {name: MeasureCurve(lines=lines, gaps=[]) for name, lines in panels.items() if lines or name == "loss"}


def _lines(compared: Comparison, of: Callable[[CurvePoint], float | None], unit: int) -> Iterator[Line]:
    """One line for each lineage. What one has inherited is the other's line too, so it is drawn once."""
    first, second = compared.inherited
    young = 0 if first and not second else 1
    for place, points in enumerate(compared.points):
        begin = max(0, compared.inherited[place] - 1) if compared.common and place == young else 0
        own = points[begin:]  # with the step that it goes on from
        known = [(point.tokens // unit if compared.axis == "tokens" else point.step, of(point)) for point in own]
        pairs = [(at, value) for at, value in known if value is not None]
        if pairs:
            yield Line(run=place, kept=True, steps=[at for at, _ in pairs], values=[value for _, value in pairs])


def _fork_mark(compared: Comparison, unit: int) -> Sequence[IncidentMark]:
    """The place where the lineages part."""
    if compared.common is None:
        return []
    step: Any = compared.common.step
    if compared.axis == "tokens":
        seen = [point.tokens for point in compared.points[0] if point.step <= step]
        step = seen[-1] // unit if seen else 0
    return [IncidentMark(incident="fork", step=step, resumed=None, quiet=True, title="the lineages part")]
