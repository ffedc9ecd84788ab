"""fp16's skipped updates in a log that does not name them: the loss scale falls beside a value that is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from opt_ops.cli.curve_files.points import OVERFLOW, Line
from opt_ops.core.detect.point import Point


def marked(lines: Iterable[Line]) -> Iterator[Line]:
    """Yield the lines; those that show an overflow have it as the reason why their update was skipped.

    A line shows one if its loss or gradient norm is not finite, and the loss scale is lower there or on the next line:
    some trainers log the scale before it is halved, others after that. Some halve it at the second overflow only. The
    last line has no next one. It shows an overflow if its loss is finite, because only then training could go on.
    """
    window: deque[Line] = deque()
    before: Point | None = None
    for line in lines:
        window.append(line)
        if len(window) < 3:
            continue
        before, told = _told(before, window)
        yield told
    while window:
        before, told = _told(before, window)
        yield told


def _told(before: Point | None, window: deque[Line]) -> tuple[Point, Line]:
    line = window.popleft()
    if _unexplained(line.point) and _is_overflow(before, line.point, [each.point for each in window]):
        line = line._replace(point=replace(line.point, skip=OVERFLOW))
    return line.point, line


def _unexplained(point: Point) -> bool:
    return not point.finite and point.skip is None and point.loss_scale is not None


def _is_overflow(before: Point | None, point: Point, later: list[Point]) -> bool:
    if before is not None and before.step < point.step and _falls(before, point):
        return True
    if not later:
        return point.loss is not None and not (before is not None and _unexplained(before))
    if later[0].step <= point.step:  # another attempt
        return False
    return _falls(point, later[0]) or (_unexplained(later[0]) and len(later) > 1 and _falls(*later))


def _falls(before: Point, after: Point) -> bool:
    return before.loss_scale is not None and after.loss_scale is not None and after.loss_scale < before.loss_scale
