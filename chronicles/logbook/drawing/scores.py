"""Scores over steps as small pictures, one for each thing that was measured. No untrusted text is in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from chronicles.evaluations import ScoreReport, Series, called, measured_by, series
from chronicles.golden_scores import golden
from chronicles.logbook.drawing.curves import run_color, thin
from chronicles.logbook.drawing.scale import Scale
from chronicles.logbook.evaluation_rows import golden_value
from chronicles.report.model import LineageReport
from chronicles.wording import score, short

_WIDTH, _HEIGHT, _EDGE = 220, 64, 5
_POINTS = 48  # of a line
_WIDE = 20.0  # times the lowest value: beyond that, the axis is logarithmic


def draw(report: LineageReport) -> list[tuple[str, str]]:
    """What was measured at several steps: its name, which is untrusted text, and its SVG."""
    places = {run.run: place for place, run in enumerate(report.runs)}
    released = golden(report.recipe, report.settings)
    return [
        _captioned(each.newest, _Picture(each, golden_value(each.newest, released), places))
        for each in series(report.evaluations)
        if len({score.step for score in (*each.settled, *each.taken_back)}) > 1
    ]


def _captioned(newest: ScoreReport, picture: _Picture) -> tuple[str, str]:
    return f"{called(newest)}, {short(measured_by(newest), 60)}: {picture.values}", picture.svg()


class _Picture:
    """One series: kept lines, dashed ones of steps that were taken back, bars of one standard error."""

    def __init__(self, each: Series, beside: float | None, places: Mapping[str, int]) -> None:
        self._settled, self._gone, self._beside, self._places = each.settled, each.taken_back, beside, places
        every = [*each.settled, *each.taken_back]
        steps = [one.step for one in every]
        self._x = Scale(low=min(steps), high=max(steps), pixels=_WIDTH - 2 * _EDGE)
        ends = [one.value + sign * (one.stderr or 0.0) for one in every for sign in (-1, 1)]
        ends += [beside] if beside is not None else []
        low, high = min(ends), max(ends)
        log = low > 0 and high > _WIDE * low
        room = 0.0 if log else max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
        self._y = Scale(low=low - room, high=high + room, pixels=_HEIGHT - 2 * _EDGE, log=log)
        self.values = f"{score(low)} to {score(high)}{', logarithmic' if log else ''}"
        """From the lowest to the highest value, errors included."""
        self._label = f"Steps {min(steps):,} to {max(steps):,}, values {self.values}"

    def svg(self) -> str:
        """The picture. Its size is that of the small curves beside the story."""
        size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
        parts = "".join([*self._level(), *self._taken_back(), *self._kept()])
        return f'<svg class="spark plot" {size} role="img" aria-label="{self._label}">{parts}</svg>'

    def _level(self) -> Iterator[str]:
        if self._beside is not None:
            title = f"<title>{score(self._beside)}: the released model</title>"
            yield f'<path class="level" d="M0 {self._height(self._beside)}H{_WIDTH}">{title}</path>'

    def _kept(self) -> Iterator[str]:
        chosen = [self._settled[i] for i in self._thin(self._settled)]
        before: list[ScoreReport] = []
        for run, found in groupby(chosen, lambda one: one.run):
            same = list(found)
            yield self._line(run, [*before, *same], "")
            yield from self._dots(run, same, "")
            before = same[-1:]

    def _taken_back(self) -> Iterator[str]:
        for run, found in groupby(sorted(self._gone, key=lambda one: (one.run, one.step)), lambda one: one.run):
            same = list(found)
            before = [one for one in self._settled if one.step < same[0].step][-1:]
            yield self._line(run, [*before, *(same[i] for i in self._thin(same))], " gone")
            yield from self._dots(run, same, " gone")

    def _thin(self, scores: Sequence[ScoreReport]) -> list[int]:
        return thin([one.step for one in scores], [one.value for one in scores], _POINTS)

    def _line(self, run: str, scores: Sequence[ScoreReport], gone: str) -> str:
        path = " ".join(f"{self._place(one.step)} {self._height(one.value)}" for one in scores)
        return f'<path class="line {self._color(run)}{gone}" d="M{path}"/>'

    def _dots(self, run: str, scores: Sequence[ScoreReport], gone: str) -> Iterator[str]:
        """Each value with its error, and both as text under the pointer."""
        for one in scores:
            at, error = self._place(one.step), one.stderr or 0.0
            bar = f"M{at} {self._height(one.value - error)}V{self._height(one.value + error)}"
            title = (
                f"<title>{score(one.value, one.stderr)} at step {one.step:,}{', taken back' if gone else ''}</title>"
            )
            color = self._color(run)
            yield f'<path class="error {color}" d="{bar}"/>' if error else ""
            yield f'<path class="dots {color}{gone}" d="M{at} {self._height(one.value)}h0">{title}</path>'

    def _color(self, run: str) -> str:
        return run_color(self._places.get(run, 0))

    def _place(self, step: int) -> str:
        return f"{_EDGE + self._x(step):.1f}"

    def _height(self, value: float) -> str:
        return f"{_HEIGHT - _EDGE - self._y(value):.1f}"
