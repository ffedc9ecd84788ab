"""How commands print: tables for people, tab-separated text for pipes, JSON for programs. Data only, on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from threading import Event, Thread
from types import MappingProxyType
from typing import Any

from opt_ops.core.text import printable, printable_lines, safe_json


class Format(StrEnum):
    """The output formats of `-o`."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    NAME = "name"


class Column:
    """A column of a table: heading, key of the value in a row, alignment, and whether it needs `-o wide`.

    `colour` gives the code of a cell's colour on a terminal (SGR of ECMA-48, such as 31), by its row; "" for none.
    """

    def __init__(
        self,
        heading: str,
        key: str,
        *,
        wide: bool = False,
        right: bool = False,
        colour: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self.heading = heading
        self.key = key
        self.wide = wide
        self.right = right
        self.colour = colour


def show(
    schema: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    form: Format,
    *,
    header: bool = True,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print rows. `rows` hold plain JSON values; times are ISO 8601 and shown to people as ages.

    Args:
        schema: Such as `opt-ops/run-list/1`; additive changes only.
        rows: The items.
        columns: Columns of the table. `-o name` prints the first one.
        form: The output format.
        header: Print the heading line of a table.
        beside: Other members of the JSON object.
    """
    if form is Format.JSON:
        print(_json({"schema": schema, "items": rows, **beside}, indent=2))
    elif form is Format.JSONL:
        for row in rows:
            print(_json({"schema": schema, **row}))
    elif form is Format.NAME:
        for row in rows:
            print(printable(str(row[columns[0].key])))
    else:
        shown = [column for column in columns if form is Format.WIDE or not column.wide]
        _table(rows, shown, header)


def _json(value: Any, indent: int | None = None) -> str:
    """As ASCII where the locale has no Unicode: the stream's own escapes would not be JSON."""
    ascii_only = not (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return safe_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], header: bool) -> None:
    cells = [[text(row.get(column.key)) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in [[column.heading for column in columns]] * header + cells:
            print("\t".join(line))
        return
    coloured = "NO_COLOR" not in os.environ
    colours = [[column.colour(row) if column.colour and coloured else "" for column in columns] for row in rows]
    for number, line in enumerate(laid_out(columns, cells, header, shutil.get_terminal_size().columns, colours)):
        heading = header and number == 0 and coloured
        print(f"\x1b[1m{line}\x1b[0m" if heading else line)


_LONG = 24  # characters: more than any number, name or state has


def laid_out(
    columns: Sequence[Column],
    cells: Sequence[Sequence[str]],
    header: bool,
    width: int,
    colours: Sequence[Sequence[str]] = (),
) -> Iterator[str]:
    """The lines of a table for a terminal of `width` characters.

    No word is broken. If one long column fits when folded, it is folded; else long cells are printed below their row.
    If the short columns alone are wider than the terminal, so are the lines.
    """
    lines = [*([[column.heading for column in columns]] if header else []), *cells]
    widths = [max((len(line[at]) for line in lines), default=0) for at in range(len(columns))]
    shown, fold = list(range(len(columns))), None
    if sum(widths) + 2 * (len(widths) - 1) > width:
        long = [at for at in shown if widths[at] > _LONG]
        left = width - sum(widths[at] + 2 for at in shown if at not in long)
        words = [len(word) for line in lines for at in long for word in line[at].split()]
        if len(long) == 1 and left >= max(_LONG, *words):
            fold, widths[long[0]] = long[0], left
        else:
            shown = [at for at in shown if at not in long]
    gap = "  " if sum(widths[at] + 2 for at in shown) - 2 <= width else " "
    for number, line in enumerate(lines):
        for part in _folded(line, fold, widths):
            placed = (part[at].rjust(widths[at]) if columns[at].right else part[at].ljust(widths[at]) for at in shown)
            codes = colours[number - header] if colours and number >= header else ()
            yield gap.join(
                _coloured(cell, codes[at] if codes else "") for at, cell in zip(shown, placed, strict=True)
            ).rstrip()
        for at in range(len(columns)) if number >= header else ():
            if at not in shown and line[at] != "-":
                yield from wrapped(f"    {columns[at].heading.lower()}: {line[at]}", 6, width)


def _coloured(cell: str, code: str) -> str:
    return f"\x1b[{code}m{cell}\x1b[0m" if code and cell.strip() else cell


def _folded(line: Sequence[str], fold: int | None, widths: Sequence[int]) -> Iterator[Sequence[str]]:
    """A row as several lines: all but the first hold only the rest of the folded cell."""
    if fold is None:
        yield line
        return
    for number, part in enumerate(textwrap.wrap(line[fold], widths[fold])):
        yield [part if at == fold else cell if number == 0 else "" for at, cell in enumerate(line)]


def wrapped(line: str, indent: int, width: int | None = None) -> list[str]:
    """Fold a line between words for a terminal, and indent the rest. Without a terminal, the line as it is."""
    if width is None:
        if not sys.stdout.isatty():
            return [line]
        width = shutil.get_terminal_size().columns
    return textwrap.wrap(
        line,
        max(width, 2 * indent),
        subsequent_indent=" " * indent,
        drop_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )


def text(value: Any) -> str:
    """A value in a table; `-` for none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # + 0.0: no "-0"
    if isinstance(value, list):
        return ",".join(text(item) for item in value)
    return printable(str(value))


_UNASKED_SECONDS = 2.0  # that nobody wonders about


@contextlib.contextmanager
def signs_of_life(what: str, seconds: float | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Say on stderr that something takes a while: one line, and on a terminal the seconds that have passed.

    Args:
        what: What is being done.
        seconds: How long it may take. None: not known; then the line comes after two seconds only.
        quiet: Say nothing.
    """
    if quiet:
        yield
        return
    if seconds is not None:
        say(f"{what}, at most {seconds:.0f} s …")
    over, began = Event(), time.monotonic()

    def tick() -> None:
        if seconds is None:
            if over.wait(_UNASKED_SECONDS):
                return
            say(f"{what} …")
        while sys.stderr.isatty() and not over.wait(1.0):
            with contextlib.suppress(OSError):
                print(f"\r  {time.monotonic() - began:.0f} s ", end="", file=sys.stderr, flush=True)

    ticker = Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
        if sys.stderr.isatty():
            print("\r", end="", file=sys.stderr, flush=True)


def say(message: str, quiet: bool = False) -> None:
    """A hint or a remark, on stderr. One that cannot be written is dropped: the command goes on."""
    if not quiet:
        with contextlib.suppress(OSError):
            print(printable_lines(message), file=sys.stderr)
