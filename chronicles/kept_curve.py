"""The settled curve: what of all that was trained still counts.

An attempt that resumes at step s makes every earlier update after s unhappen: its weights never knew of them. So the
settled curve is the telemetry of all attempts in order, where each attempt first takes back what lies beyond its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from opt_ops.core.detect.point import Point
from opt_ops.core.state.model import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What one attempt trained, and what became of it."""

    attempt: str
    run: str
    start: int  # the step it resumed from; 0: from scratch
    points: Sequence[Point]
    undone: tuple[tuple[int, str], ...]  # (step, attempt): that attempt took back every update after step; steps fall

    def undone_by(self, step: int) -> str | None:
        """The attempt that took the update `step` back; None while it counts."""
        return next((attempt for limit, attempt in self.undone if step > limit), None)

    def counts(self, point: Point) -> bool:
        """Whether this update is part of the weights: applied, and not taken back."""
        return point.finite and (not self.undone or point.step <= self.undone[-1][0])


def stretches(attempts: Mapping[str, Attempt], points: Mapping[str, Sequence[Point]]) -> list[Stretch]:
    """One stretch for each attempt, in order. `points` are each attempt's telemetry lines, in step order."""
    starts = {name: _start(attempt, points.get(name, ())) for name, attempt in attempts.items()}
    undone = undoings(starts)
    return [
        Stretch(
            attempt=name, run=attempt.run, start=starts[name], points=points.get(name, ()), undone=tuple(undone[name])
        )
        for name, attempt in attempts.items()
    ]


def undoings(starts: Mapping[str, int]) -> dict[str, Sequence[tuple[int, str]]]:
    """By attempt, as in `Stretch.undone`: what later ones took back, from the step that each attempt resumed at."""
    found: dict[str, Sequence[tuple[int, str]]] = {}
    undone: list[tuple[int, str]] = []
    for name in reversed(list(starts)):
        found[name] = undone
        # Seen from an earlier attempt, the first later one that reaches below a step is the one that takes it back.
        undone = [(starts[name], name), *(later for later in undone if later[0] < starts[name])]
    return found


def settled(parts: Sequence[Stretch]) -> Iterator[tuple[Stretch, Point]]:
    """The updates that count, by step: each step once, steps rising."""
    for part in parts:
        for point in part.points:
            if part.counts(point):
                yield part, point


def _start(attempt: Attempt, points: Sequence[Point]) -> int:
    resumed = attempt.checkpoint.step if attempt.checkpoint else 0
    # What telemetry shows outranks what was asked for: a trainer that began earlier has taken more back.
    return min(resumed, points[0].step - 1) if points else resumed
