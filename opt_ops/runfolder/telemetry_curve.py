"""Reads the curve of a telemetry file fast: of each line the few fields that a drawing or a comparison needs.

A month of training is a hundred megabytes, and `point_of` judges every field of every line. Here a line whose fields
are plainly right is taken as it is, any other line is judged by `point_of`, and a file whose lines are out of order is
read again in full. So both ways of reading say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic_core import from_json

from opt_ops.core.detect.point import Point
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import Tail
from opt_ops.runfolder.step_order import StepOrder
from opt_ops.runfolder.telemetry import LARGEST_TELEMETRY, point_of

_NEAR_STEPS = 1000  # from one line to the next: what is farther may be a stray, which `StepOrder` tells
_LARGEST = f.LARGEST_FLOAT


class CurvePoint(NamedTuple):
    """Of a line of telemetry what is drawn; as in `Point`."""

    step: int
    loss: float | None
    gnorm: float | None
    lr: float
    wps: float
    tokens: int
    finite: bool


def read_curve(path: Path) -> list[CurvePoint]:
    """Return the curve of an attempt, without lines that are not as promised. A file that cannot be read has none."""
    found: list[CurvePoint] = []
    last: int | None = None
    for line in _lines(path):
        try:
            point = _plain(line) or _of(point_of(line))
        except f.BadField:
            continue
        if last is not None and not last < point.step <= last + _NEAR_STEPS:
            return _in_order(path)
        last = point.step
        found.append(point)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from Tail(path, LARGEST_TELEMETRY, parse=_parsed).read()
    except OSError:
        return


def _parsed(line: bytes) -> Any:
    """The value. What the faster parser does not take (a lone surrogate), the one of all other readers judges."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line)


def _in_order(path: Path) -> list[CurvePoint]:
    order = StepOrder()
    found: list[CurvePoint] = []
    for line in _lines(path):
        try:
            found += map(_of, order.take(point_of(line)))
        except f.BadField:
            continue
    return found


def _of(point: Point) -> CurvePoint:
    return CurvePoint(point.step, point.loss, point.gnorm, point.lr, point.wps, point.tokens, point.finite)


def _plain(line: Mapping[str, Any]) -> CurvePoint | None:
    """The point, if every field that could make `point_of` change or refuse it has its usual type and is in bounds."""
    get = line.get
    step, tokens, betas = get("num_updates"), get("tokens"), get("betas")
    loss, gnorm, lr, wps, ts = get("loss"), get("gnorm"), get("lr"), get("wps"), get("ts")
    decay, clip = get("weight_decay"), get("clip_norm")
    if (
        type(loss) is float
        and type(gnorm) is float
        and type(lr) is float
        and type(wps) is float
        and type(ts) is float
        and type(decay) is float
        and type(clip) is float
        and type(step) is int
        and type(tokens) is int
        and type(betas) is list
        and get("finite") is True
        and -_LARGEST <= loss <= _LARGEST
        and -_LARGEST <= gnorm <= _LARGEST
        and 0.0 <= lr <= _LARGEST
        and 0.0 <= ts <= f.LAST_MOMENT
        and 0.0 <= wps <= _LARGEST
        and -_LARGEST <= decay <= _LARGEST
        and -_LARGEST <= clip <= _LARGEST
        and 0 <= step <= f.MOST_STEPS
        and 0 <= tokens <= f.LARGEST_INT
        and _are_plain(cast("list[Any]", betas))
    ):
        return CurvePoint(step, loss, gnorm, lr, wps, tokens, True)
    return None


def _are_plain(betas: Sequence[Any]) -> bool:
    if len(betas) != 2:
        return False
    first, second = betas
    return type(first) is type(second) is float and 0.0 <= first <= 1.0 and 0.0 <= second <= 1.0
