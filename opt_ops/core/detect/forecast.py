"""The loss against a forecast from its own past: a curve that leaves the range of the forecast for good.

Other detectors compare the loss with what it was. This one compares it with what it should be by now. It tells of a run
that no longer learns as before although its loss still falls.
"""

from __future__ import annotations

from collections.abc import Sequence

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.power_law import Cell, Cells, Forecast, Range, fit
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier


class ForecastDetector:
    """Fits the curve again at each power of two of its steps, and watches the octave that follows.

    A forecast over one octave is as good as the last two octaves would have been foretold, which is measured. Further
    ahead it says little. Only a loss above the range is reported: annealing takes off more than any fit knows.
    """

    FIRST = 1024
    """Steps before the first forecast: an octave then has enough steps for a spike to heal in it."""
    POINTS = 128
    """Points before the first forecast, where only some steps are logged."""
    EVIDENCE = 24.0
    """Standard deviations above the range that must add up: of 32 cells of an octave, eight that are far above it."""
    MOST = 3.0
    """What one cell counts at most: a spike of a few cells is no trend."""

    def __init__(self, planned: Sequence[int] = ()) -> None:
        """`planned` are steps from which something was planned."""
        self._cells = Cells()
        self._origin = 0  # the step from which the curve counts
        self._planned = list(planned)  # steps ahead
        self._seen = 0  # the newest step
        self._forecast: Forecast | None = None
        self._next_fit = self.FIRST
        self._clear()

    def plan(self, step: int) -> None:
        """Something was planned from `step` on: from there, the curve is another one."""
        self._planned.append(step)

    def begin(self, step: int) -> None:
        """What came after `step` is forgotten, if anything did."""
        if step >= self._seen:
            return
        self._seen = step
        if step < self._origin:  # before something that was planned: what the curve was there is not kept
            self._planned.append(self._origin + 1)
            self._restart(step)
            return
        self._cells.discard_after(step - self._origin)
        if self._forecast is not None and self._forecast.step > step - self._origin:
            self._fit()
        self._clear()

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if due := [step for step in self._planned if step <= point.step]:
            self._planned = [step for step in self._planned if step > point.step]
            self._restart(max(due) - 1)
        self._seen = point.step
        step = point.step - self._origin
        if point.loss is None or point.skip is not None or step < 1:
            return []
        closed = self._cells.add(step, point.loss, point.lr)
        if closed is None:
            return []
        found = self._compare(point, closed)
        # A fit would take what lies above the range for the new course of the curve: it waits until that is settled.
        settled = self._evidence == 0.0 or self._told or closed.step >= 2 * self._next_fit
        if settled and closed.step >= self._next_fit and self._cells.seen >= self.POINTS:
            self._fit()
            self._clear()
        return found

    def _restart(self, origin: int) -> None:
        self._cells, self._origin = Cells(), origin
        self._forecast, self._next_fit = None, self.FIRST
        self._clear()

    def _clear(self) -> None:
        self._evidence = 0.0
        self._since = 0
        self._told = False

    def _fit(self) -> None:
        cells = self._cells.closed
        self._forecast = fit(cells, self._cells.peak)
        last = cells[-1].step if cells else 0
        self._next_fit = max(self.FIRST, 1 << last.bit_length())

    def _compare(self, point: Point, cell: Cell) -> list[Finding]:
        """Add up by how far cells lie above the range. A cell inside the range subtracts."""
        forecast = self._forecast
        if forecast is None or self._told:
            return []
        expected = forecast.at(cell.step, cell.progress, cell.lr)
        off = (cell.loss - expected.high) / forecast.noise
        if self._evidence == 0.0:
            self._since = cell.step
        self._evidence = max(0.0, self._evidence + min(self.MOST, max(-self.MOST, off)))
        if self._evidence < self.EVIDENCE:
            return []
        self._told = True
        return [self._finding(point, cell, expected, forecast)]

    def _finding(self, point: Point, cell: Cell, expected: Range, forecast: Forecast) -> Finding:
        return Finding(
            signal=AlertSignal.OFF_FORECAST,
            tier=Tier.ALERT,
            step=point.step,
            onset_step=self._since + self._origin,
            at=point.ts,
            rule="the loss stays above the range that its own curve foretold",
            evidence={
                "loss": cell.loss,
                "expected": expected.expected,
                "upper": expected.high,
                "fitted_to": forecast.step + self._origin,
                "lr": point.lr,
            },
        )
