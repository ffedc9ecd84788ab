"""The order of the steps in one attempt's telemetry: which lines are strays, and where the trainer began again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opt_ops.core.detect.point import Point

_JUMP = 10_000
"""Steps forward from one line to the next that another line must confirm. A full disk loses lines, but rarely so many,
and trainers that log every so many steps log oftener than that."""
_BETWEEN_RESTARTS = 64
"""Lines between two restarts of a trainer by itself, at least: each costs the detectors what they have learned."""


class StepOrder:
    """Takes in the points of one attempt in the order of its file.

    Steps rise. A line that does not follow (the same step twice, an earlier one, or one far ahead) is kept back. If the
    next line continues from it, the trainer has begun again there, and both are taken. Else it was a stray.
    """

    def __init__(self, on_stray: Callable[[str], None] = lambda _: None, *, attempts: bool = False) -> None:
        """`on_stray` gets the reason for each line that is dropped.

        `attempts`: the file may hold several attempts, one after the other. They may be short, and one may begin with
        the last step of the one before. The same line twice is a stray.
        """
        self._on_stray = on_stray
        self._attempts = attempts
        self._last: Point | None = None
        self._kept_back: Point | None = None
        self._since_restart = _BETWEEN_RESTARTS

    def take(self, point: Point) -> list[Point]:
        """Take in the next point. Returns those that are taken now, none to two. A step that falls is a restart."""
        self._since_restart += 1
        last, before, self._kept_back = self._last, self._kept_back, None
        repeats = before is not None and last is not None and before.step == last.step and before.loss != last.loss
        rested = self._since_restart >= _BETWEEN_RESTARTS
        if last is None or last.step < point.step <= last.step + _JUMP:
            if before is not None and self._attempts and rested and repeats:
                self._since_restart = 0
                return [self._taken(before), self._taken(point)]
            if before is not None:
                self._drop(before, last)
            return [self._taken(point)]
        forward = point.step > last.step
        if before is not None and before.step < point.step <= before.step + max(_JUMP, 2 * (before.step - last.step)):
            if forward or rested or self._attempts:
                self._since_restart = self._since_restart if forward else 0
                return [self._taken(before), self._taken(point)]
            self._drop(before, last)
        elif before is not None:
            self._drop(before, last)
        self._kept_back = point
        return []

    def _taken(self, point: Point) -> Point:
        """The point. A trainer that does not say how long a step took is measured by the times of its lines."""
        last, self._last = self._last, point
        if point.step_seconds == 0.0 and last is not None and 0.0 < point.ts - last.ts < 1e6:
            return replace(point, step_seconds=(point.ts - last.ts) / max(1, point.step - last.step))
        return point

    def _drop(self, stray: Point, last: Point | None) -> None:
        self._on_stray(f"`num_updates` is {stray.step} after {last.step if last else 'none'}, and no line follows it")
