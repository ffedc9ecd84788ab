"""The record at a step, as it was known then: the same whenever it is asked for, whatever has happened since.

The journal has a report of progress each minute. Between two of them telemetry says how far training had come, so the
record at a step has one more report, made from telemetry. Without it, sums between two notes would be those between
two minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from chronicles.kept_curve import AttemptCurve
from chronicles.record import LineageRecord, until
from opt_ops.core import events as e
from opt_ops.core.detect.point import Point
from opt_ops.core.state.attempts import Attempt


def moment_of(record: LineageRecord, step: int) -> float | None:
    """When the update of a step was first complete; None while there is none.

    A rollback that discards the step later does not change it: a note that was written then stays true.
    """
    return next((point.ts for curve in record.curves for point in curve.points if _reaches(point, step)), None)


def known_at(record: LineageRecord, ts: float) -> LineageRecord:
    """The record as it was at time `ts`, with the progress that telemetry shows up to then."""
    then = until(record, ts)
    attempt = then.state.attempt
    curve = next((curve for curve in then.curves if attempt is not None and curve.attempt == attempt.name), None)
    if attempt is None or not attempt.live or curve is None or not curve.points or not then.entries:
        return then
    if curve.points[-1].step <= (attempt.last_step or 0):
        return then
    last = then.entries[-1]
    report = e.Entry(seq=last.seq + 1, epoch=last.epoch, ts=max(ts, last.ts), event=_progress(attempt, curve))
    return until(then, report.ts, more=(report,))


def _progress(attempt: Attempt, curve: AttemptCurve) -> e.AttemptProgressed:
    first, last = curve.points[0], curve.points[-1]
    newer = [point for point in curve.points if point.step > (attempt.last_step or 0)]
    times = [point.step_seconds - point.save_seconds for point in newer if point.step_seconds > 0]
    rejoined = _first_of_generation(attempt, curve.points)
    return e.AttemptProgressed(
        attempt=attempt.name,
        first_step=attempt.first_step or first.step,
        first_step_at=attempt.first_step_at or first.ts,
        step=last.step,
        at=last.ts,
        step_seconds=median(times) if times else None,
        save_seconds=sum(point.save_seconds for point in newer),
        generation=attempt.generation,
        generation_first_step=rejoined.step if rejoined else None,
        generation_first_at=rejoined.ts if rejoined else None,
    )


def _first_of_generation(attempt: Attempt, points: Sequence[Point]) -> Point | None:
    """The first step of the newest generation of the membership, where the journal does not have it yet."""
    members = attempt.members[-1] if attempt.members else None
    if members is None or members.step is None or members.first_step is not None:
        return None
    return next((point for point in points if point.step > (members.step or 0)), None)


def _reaches(point: Point, step: int) -> bool:
    return point.finite and point.step >= step
