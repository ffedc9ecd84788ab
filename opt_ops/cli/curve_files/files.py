"""Files as rows of cells: CSV in any of its dialects, JSON lines, and a JSON document that holds a list of records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Protocol, cast

from opt_ops.errors import UsageError

SAMPLE_ROWS = 1000
"""Rows that are looked at to find the columns."""
_LONGEST_CELL = 1024 * 1024
_DELIMITERS = ",;\t|"

Cells = tuple[int, Sequence[Any]]
"""The number of a line, and the cells of the asked columns: text, or a JSON value; None or "" where there is none."""


class Rows(Protocol):
    """A file of rows. It is read again for each call of `read`."""

    columns: Sequence[str]
    left_out: int
    """Lines of the last pass that could not be read: torn ones, mostly."""

    def read(self, columns: Sequence[str]) -> Iterator[Cells]:
        """Yield every row with the cells of these columns, in this order."""
        ...


def rows_of(path: Path) -> Rows:
    """The rows of a file, whatever its format.

    Raises:
        UsageError: it is neither CSV nor JSON with records.
    """
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first not in (b"{", b"["):
        return CsvRows(path)
    lines = JsonLines(path)
    return lines if lines.columns and lines.begins_well else JsonDocument(path)


class CsvRows:
    """A file with a line of column names. The delimiter is the one that makes the most columns of this line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.left_out = 0
        self.columns: Sequence[str] = ()
        csv.field_size_limit(_LONGEST_CELL)
        self._delimiter = ","
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(-1 if (size := file.seek(0, 2)) else 0, 2)
            self._torn = size > 0 and file.read(1) not in (b"\n", b"\r", b"\0")
        self._encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        for delimiter in (*_DELIMITERS, " "):
            if delimiter == " " and len(self.columns) > 1:
                break  # there, a space is part of a name
            names = next((row for _, row in self._lines(delimiter)), [])
            if len(names) > len(self.columns):
                self._delimiter, self.columns = delimiter, [name.strip() for name in names]

    def read(self, columns: Sequence[str]) -> Iterator[Cells]:
        """Yield every row. A last line that was cut short is left out; a short one elsewhere has empty cells."""
        self.left_out = 0
        places = [list(self.columns).index(name) for name in columns]
        needed, most = len(self.columns), max(places, default=0)
        lines = self._lines(self._delimiter)
        next(lines, None)
        torn: Cells | None = None
        for number, row in lines:
            if torn is not None:
                yield torn
                torn = None
            cells = [row[place] for place in places] if len(row) > most else _padded(row, places)
            if self._torn and len(row) < needed:
                torn = number, cells  # if it is the last line of a file that does not end a line
            else:
                yield number, cells
        self.left_out += torn is not None

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        try:
            with self._path.open("rb") as file, TextIOWrapper(file, encoding=self._encoding, newline="") as text:
                reader = csv.reader(text, delimiter=delimiter, skipinitialspace=delimiter != "\t")
                for row in reader:
                    if any(row) and not row[0].startswith("#"):
                        yield reader.line_num, row
        except (UnicodeError, csv.Error) as error:
            raise UsageError(
                f"{self._path} is no CSV file: {error}",
                "give a file with a line of column names, then one line for each step",
            ) from error


class JsonLines:
    """A file with a JSON object on each line. Objects within it give columns such as `train/loss`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.left_out = 0
        with path.open("rb") as file:
            self.begins_well = _is_record(file.readline())
        first: dict[str, None] = {}
        for number, record in enumerate(self._records()):
            first |= dict.fromkeys(record)
            if number >= SAMPLE_ROWS:
                break
        self.columns: Sequence[str] = list(first)

    def read(self, columns: Sequence[str]) -> Iterator[Cells]:
        """Yield every object. Lines that are no JSON objects are left out: the last one may be torn."""
        for number, record in enumerate(self._records(), 1):
            yield number + self.left_out, [record.get(name) for name in columns]

    def first(self) -> Mapping[str, Any]:
        """The first record; empty if there is none."""
        return next(self._records(), {})

    def _records(self) -> Iterator[Mapping[str, Any]]:
        self.left_out = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
                except (ValueError, RecursionError):
                    self.left_out += bool(line.strip())
                    continue
                if isinstance(value, dict):
                    yield _flat(cast("dict[str, Any]", value))


class JsonDocument:
    """One JSON value: a list of records, or an object with such a list, as `log_history` of Hugging Face's trainer."""

    def __init__(self, path: Path) -> None:
        self.left_out = 0
        try:
            value = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} is not JSON: {error}", "give CSV, or JSON with one object for each step"
            ) from error
        within = cast("dict[str, Any]", value).values() if isinstance(value, dict) else [value]
        self._records = max(map(_records_in, within), key=len, default=[])
        if not self._records:
            raise UsageError(f"{path} holds no list of records", "give CSV, or JSON with one object for each step")
        self.columns: Sequence[str] = list(dict.fromkeys(name for each in self._records for name in each))

    def read(self, columns: Sequence[str]) -> Iterator[Cells]:
        """Yield every record. They have no lines, so they are counted."""
        for number, record in enumerate(self._records, 1):
            yield number, [record.get(name) for name in columns]


def _padded(row: Sequence[str], places: Sequence[int]) -> list[str]:
    return [row[place] if place < len(row) else "" for place in places]


def _is_record(line: bytes) -> bool:
    """Whether a line is one JSON object, and not a whole document with a list of them."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not any(map(_records_in, cast("dict[str, Any]", value).values()))


def _records_in(value: Any) -> list[Mapping[str, Any]]:
    found = cast("list[Any]", value) if isinstance(value, list) else []
    return [_flat(cast("dict[str, Any]", each)) for each in found if isinstance(each, dict)]


def _flat(record: Mapping[str, Any]) -> Mapping[str, Any]:
    if not any(isinstance(value, dict) for value in record.values()):
        return record
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": each for inner, each in cast("dict[str, Any]", value).items()}
        else:
            flat[name] = value
    return flat
