"""The loss around an incident as a small SVG. There may be a thousand of them, so each must be quick and small.

Only numbers go in, and every colour is a CSS class of the page: no untrusted text can be in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from chronicles.kept_curve import AttemptCurve
from chronicles.logbook.drawing.curves import thin
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport
from chronicles.wording import whole
from opt_ops.core.detect.point import Point
from opt_ops.core.values import Action

AROUND = 200  # steps before and after
_POINTS = 150  # of all lines together, about

_LEFT, _RIGHT, _TOP, _FOOT = 36, 8, 8, 22


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture:
    """How an incident is drawn, in CSS pixels: a rollback larger than all others, and its peak in full."""

    width: int = 340
    height: int = 118
    arrow: bool = False  # to the loss at the marked step; else a vertical line
    peaks: bool = False


_Line = tuple[str, Sequence[int], Sequence[float]]  # class, steps, losses


def caption(row: IncidentReport | None) -> str:
    """One sentence below a close-up."""
    if row is None or row.action != Action.ROLLBACK or row.step_resumed is None or row.stopped_step is None:
        return f"Loss, {AROUND} steps before and after. Dashed: discarded."
    place = row.onset_step if row.onset_step is not None else row.stopped_step
    times = f", learning rate × {row.lr_factor:g}" if row.lr_factor else ""
    return (
        f"The arrow is at step {whole(place)}, where the loss left its band. Steps {whole(row.step_resumed + 1)} to "
        f"{whole(row.stopped_step)} were discarded (dashed) and trained again{times}."
    )


class Closeups:
    """Draws the incidents of one record."""

    def __init__(self, record: LineageRecord, colors: Mapping[str, str]) -> None:
        """`colors` are the CSS classes of the runs."""
        self._curves = [(each.points[0].step, each.points[-1].step, each) for each in record.curves if each.points]
        self._colors = colors

    def draw(self, row: IncidentReport) -> str:
        """The SVG of an incident; empty if there is nothing to show."""
        stopped = row.stopped_step
        if stopped is None:
            return ""
        first, last = max(1, stopped - AROUND), stopped + AROUND
        back = row.action == Action.ROLLBACK  # then all attempts lie over one another
        near = [each for begins, ends, each in self._curves if begins <= last and ends >= first]
        lines = [line for each in near for line in self._lines(each, first, last, back or each.attempt == row.attempt)]
        total = sum(len(steps) for _, steps, _ in lines)
        if total < 2:
            return ""
        lines = [_thinned(line, max(6, (2 if back else 1) * _POINTS * len(line[1]) // total)) for line in lines]
        first = min(steps[0] for _, steps, _ in lines)
        last = max(first + 1, *(steps[-1] for _, steps, _ in lines))
        if not back:
            return _svg(lines, first, last, stopped, _Picture())
        onset = row.onset_step if row.onset_step is not None else stopped
        arrow = min(max(onset, first), last)
        return _svg(lines, first, last, arrow, _Picture(width=520, height=150, arrow=True, peaks=True))

    def _lines(self, curve: AttemptCurve, first: int, last: int, hit: bool) -> Iterator[_Line]:
        """The kept updates of an attempt in the window; of the attempt that was hit, also the discarded ones."""
        begin = bisect_left(curve.points, first, key=_step)
        points = curve.points[begin : bisect_right(curve.points, last, key=_step)]
        for kept in (True, False) if hit else (True,):
            own = [p for p in points if curve.is_kept(p) == kept and p.loss is not None and isfinite(p.loss)]
            if not kept and own:
                own = [*(p for p in points if p.step == own[0].step - 1 and p.loss is not None), *own]
            if own:
                name = f"{self._colors.get(curve.run, '')}{'' if kept else ' gone'}"
                yield name, [p.step for p in own], [p.loss or 0.0 for p in own]


def _step(point: Point) -> int:
    return point.step


def _thinned(line: _Line, limit: int) -> _Line:
    name, steps, values = line
    chosen = thin(steps, values, limit)
    return name, [steps[i] for i in chosen], [values[i] for i in chosen]


def _svg(lines: Sequence[_Line], first: int, last: int, marked: int, picture: _Picture) -> str:
    width, height = picture.width, picture.height
    values = sorted(value for _, _, losses in lines for value in losses)
    low, high = values[0], values[-1]
    usual = values[int(0.9 * (len(values) - 1))]
    most = 4 * max(usual, 0.1) if picture.peaks else usual + 3 * max(usual - low, 0.1)
    high = min(high, most)  # an extreme peak is cut, so that the curve stays readable
    room = (high - low) * 0.08 or 0.5
    low, high = low - room, high + room

    def x(step: int) -> str:
        return f"{_LEFT + (width - _LEFT - _RIGHT) * (step - first) / (last - first):.0f}"

    def y(value: float) -> str:
        share = min(1.0, (value - low) / (high - low))
        return f"{_TOP + (height - _TOP - _FOOT) * (1 - share):.0f}"

    base = height - _FOOT
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    name = "closeup back" if picture.arrow else "closeup"
    parts = [f'<svg class="{name}" {size} role="img" aria-label="Loss from step {first} to {last}">']
    parts.append(f'<path class="axis" d="M{_LEFT} {base}H{width - _RIGHT}"/>')
    heights = (low + room, high - room)
    parts += [f'<text x="{_LEFT - 6}" y="{y(v)}" dy="4" text-anchor="end">{v:.3g}</text>' for v in heights]
    if not picture.arrow:
        parts.append(f'<path class="stop" d="M{x(marked)} {_TOP}V{base}"/>')
    for color, steps, losses in sorted(lines, key=lambda line: not line[0].endswith("gone")):
        pairs = " ".join(f"{x(step)} {y(value)}" for step, value in zip(steps, losses, strict=True))
        parts.append(f'<path class="line {color}" d="M{pairs}"/>')
    if picture.arrow:
        parts.append(_arrow(x(marked), float(y(_height_at(lines, marked)))))
    parts += [f'<text x="{_LEFT}" y="{height - 6}">{first:,}</text>', _label(x(marked), height, marked, first, last)]
    parts.append(f'<text x="{width - _RIGHT}" y="{height - 6}" text-anchor="end">{last:,}</text></svg>')
    return "".join(parts)


def _height_at(lines: Sequence[_Line], step: int) -> float:
    """The highest loss that any line has at a step, as far as points are drawn near it."""
    near = [(abs(at - step), -value) for _, steps, losses in lines for at, value in zip(steps, losses, strict=True)]
    return -min(near)[1]


def _arrow(x: str, tip: float) -> str:
    """An arrow from above, or from below where there is no room above."""
    down = tip > 2.5 * _TOP + 14
    sign = -1 if down else 1
    head = f"m-3.5 {sign * 5}l3.5 {-sign * 5}l3.5 {sign * 5}"
    return f'<path class="arrow" d="M{x} {tip + sign * 24:.0f}V{tip + sign * 5:.0f}{head}"/>'


def _label(x: str, height: int, marked: int, first: int, last: int) -> str:
    """The marked step, if there is room for it between the ends."""
    share = (marked - first) / (last - first)
    return f'<text x="{x}" y="{height - 6}" text-anchor="middle">{marked:,}</text>' if 0.25 < share < 0.75 else ""
