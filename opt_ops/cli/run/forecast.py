"""`opt-ops run forecast`: the loss that a curve foretells for later steps, with its range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.run.commands import app
from opt_ops.cli.shared.options import FormatOption, HeaderOption, IdArgument, QuietOption, complete_id, lineage_folder
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.decide.proof import planned_lr
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.power_law import LEAST_CELLS, Cells, Forecast, fit
from opt_ops.errors import OptOpsError, UsageError

if TYPE_CHECKING:
    from chronicles.record import LineageRecord

_NEAR = 0.02
"""The loss of a step that is known already is the median of the last 2 % of steps before it."""
_INTEGRATED = 2000  # points at which the planned learning rate is looked up between two steps


@dataclass(frozen=True, slots=True)
class _Curve:
    """The kept curve of a lineage."""

    lineage: str
    points: Sequence[Point]
    steps: int | None  # the last one that will be trained
    planned: Callable[[int], float | None]  # learning rate by step

    def fitted(self, until: int) -> tuple[Forecast | None, int]:
        """The forecast from the steps up to `until`, and the number of points behind it."""
        cells = Cells()
        for point in self.points:
            if point.step <= until and point.loss is not None and point.skip is None:
                cells.add(point.step, point.loss, point.lr)
        return fit(cells.closed, cells.peak), cells.seen

    def ahead(self, until: int, step: int) -> tuple[float, float]:
        """The sum of learning rates up to `step`, and the learning rate there; what is not known stays as it was."""
        total, before, lr = 0.0, 0, 0.0
        for point in self.points:
            if point.step > min(until, step):
                break
            total, before, lr = total + point.lr * (point.step - before), point.step, point.lr
        known = {point.step: point.lr for point in self.points if point.step > before}
        stride = max(1, (step - before) // _INTEGRATED)
        while before < step:
            there = min(step, before + stride)
            planned = known.get(there) if there in known else self.planned(there)
            lr = lr if planned is None else planned
            total, before = total + lr * (there - before), there
        return total, lr

    def loss(self, step: int) -> float | None:
        """The loss at a step, if it is trained already."""
        if not self.points or self.points[-1].step < step:
            return None
        near = [p.loss for p in self.points if step * (1 - _NEAR) <= p.step <= step and p.loss is not None]
        return sorted(near)[len(near) // 2] if near else None


@app.command("forecast")
def forecast(
    identifier: IdArgument,
    at: Annotated[
        list[int] | None,
        typer.Option("--at", min=1, help="A step to foretell; repeatable. [default: quarters and the end]"),
    ] = None,
    until: Annotated[
        int,
        typer.Option("--until", min=0, help="Use the curve up to this step only. [default: all]", show_default=False),
    ] = 0,
    from_: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="ID",
            help="A smaller run of the same kind that is over: correct by what its forecast missed; repeatable.",
            autocompletion=complete_id,
        ),
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Foretell the loss of later steps from the curve so far.

    It is a power law, with what annealing takes off, and a range.

    The range holds every fit that is about as good, and twice what such a fit missed in the last two doublings of the
    step. From the first tenth of a run it is wide. With --from, smaller runs say what a forecast at this share misses.

    Examples:
      opt-ops run forecast 12
      opt-ops run forecast 12 --at 100000 --from 10 --from 11 -o json
      opt-ops run forecast 12 --until 14000
    """
    curve = _curve(identifier)
    last = curve.points[-1].step if curve.points else 0
    until = min(until, last) if until else last
    made, points = curve.fitted(until)
    if made is None:
        raise OptOpsError(
            f"lineage {curve.lineage} has too few points for a forecast: {points} points up to step {until}. It needs "
            f"{LEAST_CELLS} different places after warm-up, over a doubling of the step, and a loss that falls",
            f"opt-ops run show {curve.lineage}; give a later --until, or wait",
        )
    steps = at or _default_steps(curve, until)
    if not steps or min(steps) <= until:
        raise UsageError(f"--at must be after step {until}, up to which the curve is used", "give a later --at")
    smaller = [_curve(each) for each in from_ or []]
    rows = [_row(curve, made, points, until, step, smaller) for step in steps]
    columns = [
        Column("STEP", "step", right=True),
        Column("EXPECTED", "expected", right=True),
        Column("LOW", "low", right=True),
        Column("HIGH", "high", right=True),
        Column("LOSS", "loss", right=True),
        Column("BASIS", "basis"),
        Column("EXPONENT", "exponent", right=True, wide=True),
        Column("FLOOR", "floor", right=True, wide=True),
    ]
    show("opt-ops/run-forecast/1", rows, columns, output, header=header)
    say(
        f"Fitted to {points} points up to step {until}. A forecast assumes that nothing changes but the schedule.",
        quiet,
    )


def _row(
    curve: _Curve, made: Forecast, points: int, until: int, step: int, smaller: Sequence[_Curve]
) -> dict[str, Any]:
    found = made.at(step, *curve.ahead(until, step))
    expected, low, high = found.expected, found.low, found.high
    if smaller:
        misses = [_miss(each, until / step) for each in smaller]
        shift = sum(misses) / len(misses)
        spread = 2.0 * max(abs(each - shift) for each in misses) + 0.5 * abs(shift)
        expected *= 1.0 + shift
        reach = expected * spread + 3.0 * made.noise
        low, high = max(0.0, expected - reach), expected + reach
    return {
        "step": step,
        "expected": expected,
        "low": low,
        "high": high,
        "loss": curve.loss(step),
        "basis": "smaller runs" if smaller else "own curve",
        "from": [each.lineage for each in smaller],
        "fitted_to": until,
        "points": points,
        "exponent": made.best.exponent,
        "floor": made.best.floor,
        "noise": made.noise,
    }


def _miss(curve: _Curve, share: float) -> float:
    """By what share of the loss the end of a run differs from its forecast at this share of its steps.

    Raises:
        OptOpsError: the run has too few points there.
    """
    end = curve.points[-1].step if curve.points else 0
    until = int(share * end)
    made, points = curve.fitted(until)
    loss = curve.loss(end)
    if made is None or loss is None:
        raise OptOpsError(
            f"--from {curve.lineage}: too few points for a forecast at step {until} of {end}: {points} points",
            "leave it out, or give a smaller run that is longer",
        )
    return loss / made.at(end, *curve.ahead(until, end)).expected - 1.0


def _default_steps(curve: _Curve, until: int) -> list[int]:
    end = curve.steps if curve.steps and curve.steps > until else 4 * until
    return sorted({step for step in (end // 4, end // 2, 3 * end // 4, end) if step > until})


def _curve(identifier: str) -> _Curve:
    from chronicles.kept_curve import kept_points
    from chronicles.record import load

    record = load(lineage_folder(identifier))
    points = [point for _, point in kept_points(record.curves)]
    attempts = list(record.state.attempts.values())
    steps = next((attempt.steps for attempt in reversed(attempts) if attempt.steps), None)
    return _Curve(record.lineage, points, steps, _planned(record))


def _planned(record: LineageRecord) -> Callable[[int], float | None]:
    attempt = record.state.attempt
    plan = planned_lr(record.state, attempt) if attempt is not None else None
    return plan.at if plan is not None else lambda _: None
