"""Markdown of untrusted text: none of it can become markup, HTML, a new line or table cell, or a link."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opt_ops.core.text import printable


def plain(text: str) -> str:
    """Untrusted text as one line of Markdown that shows itself, character by character."""
    line = printable(" ".join(text.split()))
    line = re.sub(r"([\\`*\[\]<>|~&!#])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # within a word it is no markup


def code(text: str) -> str:
    """Untrusted text as a code span, fenced by more backticks than it has in a row."""
    line = printable(" ".join(text.split()))
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def quote(text: str) -> list[str]:
    """Untrusted text of several lines as a block quote."""
    lines = [re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", plain(line)) for line in text.splitlines()]  # no list, no heading
    return [f"> {line}  ".rstrip() if line == lines[-1] else f"> {line}  " for line in lines]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already; a column whose head begins with `>` is set to the right."""
    rule = ["---:" if head.startswith(">") else "---" for head in heads]
    lines = [[head.removeprefix(">") for head in heads], rule, *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
