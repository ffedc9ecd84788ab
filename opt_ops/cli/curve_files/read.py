"""Reads a curve from a file: the entry of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opt_ops.cli.curve_files.columns import chosen
from opt_ops.cli.curve_files.files import JsonLines, Rows, rows_of
from opt_ops.cli.curve_files.overflows import marked
from opt_ops.cli.curve_files.points import Line, Passed, lines
from opt_ops.runfolder import telemetry

_TELEMETRY = frozenset({"num_updates", "ts", "lr", "loss"})
"""What each line of docs/formats.md's telemetry has, and no other tool's together."""


class CurveFile:
    """A file with a curve. Its columns are found at once, its lines are read when they are asked for."""

    def __init__(self, path: Path, said: Sequence[str] = ()) -> None:
        """`said` names columns: `loss=train/loss`.

        Raises:
            UsageError: it is no CSV or JSON, or its columns are not found.
        """
        self._path = path
        self._rows: Rows = rows_of(path)
        self.passed = Passed()
        own = isinstance(self._rows, JsonLines) and set(self._rows.first()) >= _TELEMETRY and not said
        self.columns: Mapping[str, str] | None = None if own else chosen(path, self._rows, said)
        """What was taken for what; None for our own telemetry."""

    def lines(self) -> Iterator[Line]:
        """Yield the lines in the order of the file.

        Raises:
            UsageError: a cell is no number, or a step is no whole number; the message names the line.
        """
        if self.columns is None:
            yield from map(Line, telemetry.points(self._path, on_bad=self._torn))
        else:
            found = lines(self._path, self._rows, self.columns, self.passed)
            yield from marked(found) if "loss_scale" in self.columns else found

    def _torn(self, _line: int, _why: str) -> None:
        self.passed.unreadable += 1
