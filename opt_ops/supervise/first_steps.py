"""The first steps that were made after ranks were replaced in place: what proves the replacement."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.supervise.training_signals import readback_of

_RECENT = 64  # lines between two looks at telemetry, which may come before the news that all ranks have joined


class FirstSteps:
    """Collects the first telemetry lines of the newest generation of an attempt's ranks."""

    def __init__(self, enough: Callable[[Sequence[Point]], bool]) -> None:
        """`enough`: whether so many lines are enough for a proof."""
        self._enough = enough
        self._recent: deque[Point] = deque(maxlen=_RECENT)
        self._joined: Members | None = None
        self._points: list[Point] = []

    def follow(self, attempt: Attempt) -> bool:
        """Follow the newest generation that has joined. Returns whether it is another one than before."""
        joined = [m for m in attempt.members if m.step is not None]
        newest = joined[-1] if joined else None
        before, self._joined = self._joined, newest
        if newest is None or (before is not None and before.generation == newest.generation):
            return False
        self._points = [point for point in self._recent if self._follows(point)]
        return True

    def take(self, point: Point) -> None:
        """Take in a line."""
        self._recent.append(point)
        if self._follows(point) and not self._enough(self._points):
            self._points.append(point)

    @property
    def awaited(self) -> bool:
        """Whether ranks have joined and have made no step yet."""
        return self._joined is not None and not self._points

    @property
    def news(self) -> bool:
        """Whether there is something that the state does not have."""
        if self._joined is None or not self._points:
            return False
        known = self._joined.readbacks
        return self._joined.first_step is None or (self._enough(self._points) and len(known) < len(self._points))

    def fields(self) -> dict[str, Any]:
        """What a report of progress says of it."""
        if self._joined is None or not self._points:
            return {}
        first = self._points[0]
        read = tuple(replace(readback_of(point), position=point.data_position) for point in self._points)
        return {
            "generation": self._joined.generation,
            "generation_first_step": first.step,
            "generation_first_at": first.ts,
            "generation_readbacks": () if len(self._joined.readbacks) >= len(read) else read,
        }

    def _follows(self, point: Point) -> bool:
        return self._joined is not None and self._joined.step is not None and point.step > self._joined.step
