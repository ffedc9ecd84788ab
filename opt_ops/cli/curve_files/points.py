"""Points of cells. An unknown value stays unknown; a value that is not finite makes the point one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opt_ops.cli.curve_files.files import Rows
from opt_ops.core.detect.point import Point
from opt_ops.core.text import clean
from opt_ops.errors import UsageError
from opt_ops.runfolder.fields import LARGEST_FLOAT, LONGEST_NAME, MOST_STEPS

OVERFLOW = "overflow"
_EMPTY = frozenset({"", "null", "none", "na", "n/a", "-", "--"})
_NO = frozenset({"0", "0.0", "false", "no", "none", "nan", "null", ""})
_YES = frozenset({"true", "yes", "skip", "skipped", "inf", "found_inf"})


class Line(NamedTuple):
    """A point, and what the file says of the attempt and the run that it belongs to; None: nothing."""

    point: Point
    attempt: str | None = None
    run: str | None = None


@dataclass(slots=True)
class Passed:
    """What was passed over: rows without a loss, lines that could not be read, and stray lines."""

    without_loss: int = 0
    unreadable: int = 0
    strays: int = 0


def lines(path: Path, rows: Rows, columns: Mapping[str, str], passed: Passed) -> Iterator[Line]:
    """Yield the points of a file whose columns are known.

    Raises:
        UsageError: a cell is no number, or a step is no whole number; the message names the line.
    """
    names = list(columns)
    reader = _Reader(path, columns)
    place = {name: at for at, name in enumerate(names)}
    loss_at, step_at, finite_at = place["loss"], place["step"], place.get("finite")
    for number, cells in rows.read(list(columns.values())):
        reader.number = number
        loss = reader.number_in(cells[loss_at], "loss")
        if loss is None and finite_at is not None and str(cells[finite_at]).lower() == "false":
            loss = math.nan
        if loss is None:
            passed.without_loss += 1
            continue
        step = reader.step(cells[step_at])
        yield reader.line(step, loss, dict(zip(names, cells, strict=True)))
    passed.unreadable = rows.left_out


class _Reader:
    """Makes lines of cells. What only some rows have, such as the learning rate, holds until it is logged again."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self._path = path
        self._columns = columns
        self.number = 0
        self._lr = 0.0
        self._attempt: str | None = None
        self._run: str | None = None
        self._stage: str | None = None
        self._batch: int | None = None
        self._tokens: int | None = None

    def line(self, step: int, loss: float, cells: Mapping[str, Any]) -> Line:
        """The line of a row."""
        gnorm = self._optional(cells, "grad_norm")
        scale = self._optional(cells, "loss_scale")
        lr = self._optional(cells, "lr")
        if lr is not None and math.isfinite(lr):
            self._lr = lr
        self._batch = self._count(cells, "batch") or self._batch
        self._tokens = self._count(cells, "tokens") or self._tokens
        self._stage = _text(cells.get("stage")) or self._stage
        self._attempt = _text(cells.get("attempt")) or self._attempt
        self._run = _text(cells.get("run")) or self._run
        known = math.isfinite(loss)
        point = Point(
            step=step,
            ts=0.0,
            loss=_bounded(loss) if known else None,
            gnorm=_bounded(gnorm) if gnorm is not None and math.isfinite(gnorm) else None,
            lr=self._lr,
            betas=(),
            weight_decay=0.0,
            clip_norm=0.0,
            step_seconds=0.0,
            tokens=0,
            wps=0.0,
            finite=known and (gnorm is None or math.isfinite(gnorm)),
            loss_scale=scale if scale is not None and math.isfinite(scale) else None,
            skip=_skip(cells.get("skip")) if "skip" in cells else None,
            batch=self._batch,
            batch_tokens=self._tokens,
            stage=self._stage,
        )
        return Line(point, self._attempt, self._run)

    def step(self, cell: Any) -> int:
        """The step in a cell.

        Raises:
            UsageError: it is no whole number.
        """
        try:
            step = int(cell)
        except (TypeError, ValueError):
            value = self.number_in(cell, "step")
            step = int(value) if value is not None and math.isfinite(value) and value == int(value) else -1
        if (isinstance(cell, float) and cell != step) or not 0 <= step <= MOST_STEPS:
            raise UsageError(
                f"{self._path}, line {self.number}: step is {str(cell or '')[:40]!r}, "
                f"not a whole number up to {MOST_STEPS:,}",
                "correct the line, or name another column: --column step=COLUMN",
            )
        return step

    def number_in(self, cell: Any, name: str) -> float | None:
        """The number in a cell; None if it is empty.

        Raises:
            UsageError: it is no number.
        """
        try:
            return float(cell)
        except (TypeError, ValueError):
            pass
        except OverflowError:
            return math.inf
        text = "" if cell is None else str(cell).strip()
        if text.lower() in _EMPTY:
            return None
        try:  # a comma divides thousands in steps, and is a decimal sign elsewhere
            return float(text.replace(",", "" if name == "step" else "."))
        except ValueError:
            raise UsageError(
                f"{self._path}, line {self.number}: {name} is {text[:40]!r}, not a number",
                "correct the cell, leave it empty, or name another column with --column",
            ) from None

    def _optional(self, cells: Mapping[str, Any], name: str) -> float | None:
        return self.number_in(cells[name], self._columns[name]) if name in cells else None

    def _count(self, cells: Mapping[str, Any], name: str) -> int | None:
        value = self._optional(cells, name)
        return round(value) if value is not None and math.isfinite(value) and value >= 1 else None


def _bounded(value: float) -> float:
    return value if -LARGEST_FLOAT <= value <= LARGEST_FLOAT else math.copysign(LARGEST_FLOAT, value)


def _text(cell: Any) -> str | None:
    if cell is None or cell == "":
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return clean(str(cell).strip().removesuffix(".0"), LONGEST_NAME) or None


def _skip(cell: Any) -> str | None:
    """Why an update was not applied. Tools that count or flag skipped updates mean those of fp16."""
    text = "" if cell is None else str(cell).strip().lower()
    if text in _NO:
        return None
    return OVERFLOW if text in _YES or text.replace(".", "", 1).isdigit() else clean(text, LONGEST_NAME)
