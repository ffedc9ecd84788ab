"""Curves that people give to `opt-ops signals replay`: CSV, or the telemetry of an attempt."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from opt_ops.core.detect.point import Point
from opt_ops.errors import UsageError
from opt_ops.runfolder import telemetry

_NEEDED, _OPTIONAL = ("step", "loss"), ("grad_norm", "loss_scale", "lr")


def points(path: Path) -> Iterator[Point]:
    """The points of a curve: of CSV, or of the telemetry that a trainer writes (JSON lines).

    Raises:
        UsageError: a column is missing, a cell is no number, or steps do not increase; the message names the line.
    """
    last: int | None = None
    for point, where in _telemetry(path) if _is_telemetry(path) else _cells(path):
        if last is not None and point.step <= last:
            raise UsageError(
                f"{where}: step {point.step} comes after step {last}", "give one run only, ordered by step"
            )
        last = point.step
        yield point
    if last is None:
        raise UsageError(f"{path}, line 2: no points", "add at least one line with a step and a loss")


def _is_telemetry(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip()[:1] == b"{"


def _telemetry(path: Path) -> Iterator[tuple[Point, str]]:
    """The lines that are telemetry; the reader leaves out others, as the daemon does."""
    for point in telemetry.points(path):
        yield point, str(path)


def _cells(path: Path) -> Iterator[tuple[Point, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            names = reader.fieldnames or []
            if missing := [name for name in _NEEDED if name not in names]:
                raise UsageError(
                    f"{path}, line 1: no column {' or '.join(missing)} in {', '.join(names) or 'an empty file'}",
                    f"name the columns in the first line: {', '.join(_NEEDED)}; optional {', '.join(_OPTIONAL)}",
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                yield _point(row, where), where
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path} is no CSV file: {error}", "give columns step and loss, one line for each step"
        ) from error


def _point(row: dict[str, str], where: str) -> Point:
    step = _number(row, "step", where)
    if step is None or not math.isfinite(step) or step != int(step):
        raise UsageError(f"{where}: step is {row.get('step')!r}, not a whole number", "correct the line, or remove it")
    loss = _number(row, "loss", where)
    if loss is None:
        raise UsageError(f"{where}: loss is empty", "remove the line, or write nan if the loss was not finite")
    gnorm = _number(row, "grad_norm", where)
    gnorm = 1.0 if gnorm is None else gnorm  # a constant is always in its band: an unknown norm must raise no signal
    return Point(
        step=int(step),
        ts=0.0,
        loss=loss if math.isfinite(loss) else None,
        gnorm=gnorm if math.isfinite(gnorm) else None,
        lr=_number(row, "lr", where) or 0.0,
        betas=(),
        weight_decay=0.0,
        clip_norm=0.0,
        step_seconds=0.0,
        tokens=0,
        wps=0.0,
        finite=math.isfinite(loss) and math.isfinite(gnorm),
        loss_scale=_number(row, "loss_scale", where),
    )


def _number(row: dict[str, str], name: str, where: str) -> float | None:
    cell = (row.get(name) or "").strip()
    try:
        return float(cell) if cell else None
    except ValueError:
        raise UsageError(
            f"{where}: {name} is {cell[:40]!r}, not a number", "correct the cell, or leave it empty"
        ) from None
