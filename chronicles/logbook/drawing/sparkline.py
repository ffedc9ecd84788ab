"""The loss of a phase as a small picture beside its paragraph: where the curve went, and where it was interrupted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import median

from chronicles.logbook.drawing.anchors import slug
from chronicles.logbook.drawing.curves import Line, MeasureCurve, run_color, thin
from chronicles.logbook.drawing.marks import IncidentMark
from chronicles.logbook.story.model import Paragraph

_WIDTH, _HEIGHT, _EDGE = 220, 56, 4
_POINTS = 160  # of all lines together, about


def draw(loss: MeasureCurve, phase: Paragraph, placed: Sequence[IncidentMark]) -> str:
    """The SVG of a phase; empty if it has no steps. A vertical line is a named incident, and a link to it."""
    first, last = phase.first_step, phase.last_step
    if first is None or last is None or last - first < 2:
        return ""
    parts = [part for line in loss.lines if (part := _between(line, first, last))]
    total = sum(len(steps) for _, steps, _ in parts)
    if total < 2:
        return ""
    values = sorted(value for _, _, heights in parts for value in heights)
    low = values[0]
    high = min(values[-1], 4 * median(values))  # a wild peak is cut
    high = max(high, low + 0.15 * abs(low), low + 1e-9)  # the rustle of a quiet phase looks quiet

    def x(step: int) -> str:
        return f"{_EDGE + (_WIDTH - 2 * _EDGE) * (step - first) / (last - first):.1f}"

    def y(value: float) -> str:
        return f"{_EDGE + (_HEIGHT - 2 * _EDGE) * (1 - (min(value, high) - low) / (high - low)):.1f}"

    named = [mark for mark in placed if mark.named and first <= mark.step <= last]
    drawn = [
        f'<a href="#{slug(mark.incident)}"><path class="at" d="M{x(mark.step)} 0V{_HEIGHT}"/>'
        f'<path class="hit" d="M{x(mark.step)} 0V{_HEIGHT}"><title>{mark.told}</title></path></a>'
        for mark in named
    ]
    for line, steps, heights in sorted(parts, key=lambda part: part[0].kept):
        chosen = thin(steps, heights, max(8, _POINTS * len(steps) // total))
        path = " ".join(f"{x(steps[i])} {y(heights[i])}" for i in chosen)
        drawn.append(f'<path class="line {run_color(line.run)}{"" if line.kept else " gone"}" d="M{path}"/>')
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    label = f"Loss from step {first:,} to {last:,}, {low:.3g} to {values[-1]:.3g}"
    return f'<svg class="spark plot" {size} role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _between(line: Line, first: int, last: int) -> tuple[Line, Sequence[int], Sequence[float]] | None:
    begin, end = bisect_left(line.steps, first), bisect_right(line.steps, last)
    return (line, line.steps[begin:end], line.values[begin:end]) if end - begin > 1 else None
