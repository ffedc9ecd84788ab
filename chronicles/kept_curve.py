"""Which of all trained steps are part of the present weights.

An attempt that resumes at step s discards every earlier update after s: its weights never saw them. So the kept curve
is the telemetry of all attempts in order, where each attempt first discards what lies beyond its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from opt_ops.core.detect.point import Point
from opt_ops.core.state.attempts import Attempt


class Update(Protocol):
    """What is asked of a line of telemetry here."""

    @property
    def step(self) -> int: ...  # noqa: D102

    @property
    def finite(self) -> bool: ...  # noqa: D102


U = TypeVar("U", bound=Update)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveOf(Generic[U]):
    """What one attempt trained, and which of it later attempts discarded."""

    attempt: str
    run: str
    start: int  # the step it resumed from; 0: from scratch
    points: Sequence[U]  # steps rise
    discarded: tuple[tuple[int, str], ...]  # (step, attempt): that attempt discarded all updates after step; steps fall

    def discarded_by(self, step: int) -> str | None:
        """The attempt that discarded the update `step`; None if the update is kept."""
        return next((attempt for limit, attempt in self.discarded if step > limit), None)

    def is_kept(self, point: U) -> bool:
        """Whether this update is part of the present weights: applied, and not discarded."""
        return point.finite and (not self.discarded or point.step <= self.discarded[-1][0])


AttemptCurve = CurveOf[Point]


def attempt_curves(attempts: Mapping[str, Attempt], points: Mapping[str, Sequence[U]]) -> list[CurveOf[U]]:
    """One curve for each attempt, in order. `points` are each attempt's telemetry lines, in step order."""
    starts = {name: _start(attempt, points.get(name, ())) for name, attempt in attempts.items()}
    discarded = discards(starts)
    return [
        CurveOf(
            attempt=name,
            run=attempt.run,
            start=starts[name],
            points=points.get(name, ()),
            discarded=tuple(discarded[name]),
        )
        for name, attempt in attempts.items()
    ]


def discards(starts: Mapping[str, int]) -> dict[str, Sequence[tuple[int, str]]]:
    """By attempt, what later attempts discarded of it, as in `AttemptCurve.discarded`.

    Args:
        starts: By attempt, in order: the step that it resumed from.
    """
    found: dict[str, Sequence[tuple[int, str]]] = {}
    discarded: list[tuple[int, str]] = []
    for name in reversed(list(starts)):
        found[name] = discarded
        # Of an earlier attempt's updates beyond a step, the first later attempt that resumed below it discards them.
        discarded = [(starts[name], name), *(later for later in discarded if later[0] < starts[name])]
    return found


def kept_points(curves: Sequence[CurveOf[U]]) -> Iterator[tuple[CurveOf[U], U]]:
    """The kept updates: each step once, steps rise."""
    for curve in curves:
        for point in curve.points:
            if curve.is_kept(point):
                yield curve, point


def _start(attempt: Attempt, points: Sequence[Update]) -> int:
    resumed = attempt.checkpoint.step if attempt.checkpoint else 0
    # Telemetry outranks the request: a trainer that resumed earlier than requested discarded more.
    return min(resumed, points[0].step - 1) if points else resumed
