"""What commands print: tables for people, tab-separated text for pipes, JSON as a contract. Data only, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from opt_ops.core.codec import to_iso


class Format(StrEnum):
    """The forms of `-o`."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    NAME = "name"


class Column:
    """A column of a table: its heading, how a row's value is shown, and whether it needs `-o wide`."""

    def __init__(self, heading: str, key: str, *, wide: bool = False, right: bool = False) -> None:
        self.heading = heading
        self.key = key
        self.wide = wide
        self.right = right


def show(
    schema: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], form: Format, *, header: bool = True
) -> None:
    """Print rows. `rows` hold plain JSON values; times are ISO 8601 and shown to people as ages.

    Args:
        schema: Such as `opt-ops/run-list/1`; additive changes only.
        rows: The items.
        columns: What a table shows of them. The first one is what `-o name` prints.
        form: The form.
        header: Whether a table has its heading line.
    """
    if form is Format.JSON:
        print(json.dumps({"schema": schema, "items": rows}, indent=2, ensure_ascii=False, allow_nan=False))
    elif form is Format.JSONL:
        for row in rows:
            print(json.dumps({"schema": schema, **row}, ensure_ascii=False, allow_nan=False))
    elif form is Format.NAME:
        for row in rows:
            print(row[columns[0].key])
    else:
        shown = [column for column in columns if form is Format.WIDE or not column.wide]
        _table(rows, shown, header)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], header: bool) -> None:
    cells = [[text(row.get(column.key)) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in [[column.heading for column in columns]] * header + cells:
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))  # Text: what a log or a note says is never markup
    Console().print(table)


def text(value: Any) -> str:
    """A value in a table; `-` for none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(text(item) for item in value)
    return printable(str(value))


def printable(value: str) -> str:
    """Untrusted text for a terminal: one line, no control characters."""
    if value.isprintable():
        return value
    return "".join(character if character.isprintable() else "�" for character in value.replace("\n", " "))


def age(seconds: float) -> str:
    """`3h12m`, `22m`, `45s`."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def iso(ts: float | None) -> str | None:
    """For JSON."""
    return None if ts is None else to_iso(ts)


def clock(ts: float) -> str:
    """For tables: `2026-11-22 03:14:07Z`."""
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def say(message: str, quiet: bool = False) -> None:
    """A hint or a remark, on stderr."""
    if not quiet:
        print(message, file=sys.stderr)
