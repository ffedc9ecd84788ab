"""Afterthoughts on alerts that became no incident: how high the curve went, and when it was back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from chronicles.logbook.entries.incidents import preceded_by
from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.wording import count, whole
from opt_ops.core import events as e
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal, FailureClass

_BACK = 5  # points in a row whose median is in the band again
_MOST = 1000  # points after the onset that are looked at: what has not healed by then has not healed by itself

_CURVES: dict[str, tuple[str, Callable[[Point], float | None]]] = {
    FailureClass.LOSS_SPIKE: ("loss", lambda point: point.loss),
    FailureClass.LOSS_DRIFT: ("loss", lambda point: point.loss),
    AlertSignal.GRADIENT_NORM: ("gradient norm", lambda point: point.gnorm),
}


def after_alerts(timeline: Timeline) -> Iterator[Afterthought]:
    """What became of each alert without an incident. Needs telemetry: without it there is nothing to say."""
    curves = {curve.attempt: curve.points for curve in timeline.record.curves}
    for entry, alert in timeline.alerts:
        known, limit = _CURVES.get(alert.signal), alert.evidence.get("limit")
        if (
            known is None
            or not isinstance(limit, (int, float))
            or alert.onset_step is None
            or acted_on(timeline, alert)
        ):
            continue
        name, value = known
        points = [point for point in curves[alert.attempt] if point.step >= alert.onset_step][:_MOST]
        found = _healed(points, value, limit)
        if found is None:
            continue
        highest, back = found
        usual = alert.evidence.get("median")
        above = f", usually {usual:#.3g}" if isinstance(usual, (int, float)) else ""
        steps = count(back.step - alert.onset_step, "step")
        yield Afterthought(
            anchor=f"e{entry.seq}",
            at=Moment(back.ts),
            kind=Later.HEALED,
            verdict=Judged.HEALED,
            text=f"The {name} went up to {highest:#.3g}{above}, and was back below {limit:#.3g} after {steps}, "
            f"at step {whole(back.step)}.",
            because=(),
            next=None,
        )


def acted_on(timeline: Timeline, alert: e.SignalRaised) -> bool:
    """Whether an alert became an incident of the same attempt."""
    rows = timeline.report.incidents
    return any(row.attempt == alert.attempt and preceded_by(row, alert.step) for row in rows)


def _healed(
    points: Sequence[Point], value: Callable[[Point], float | None], limit: float
) -> tuple[float, Point] | None:
    """The highest value since the onset, and the first point of those that are back in the band; None: it is not."""
    values = [value(point) for point in points]
    last = next((i for i in range(1, len(values)) if _is_back(values[i : i + _BACK], limit)), None)
    known = [each for each in values[:last] if each is not None]
    return (max(known), points[last]) if last is not None and known else None


def _is_back(values: Sequence[float | None], limit: float) -> bool:
    known = [each for each in values if each is not None]
    return len(values) == _BACK == len(known) and known[0] <= limit and median(known) <= limit
