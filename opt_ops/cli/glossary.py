"""`opt-ops glossary`: the words of opt-ops, from the table of docs/glossary.md."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from opt_ops.cli.shared.options import FormatOption, HeaderOption
from opt_ops.cli.shared.output import Column, Format, show
from opt_ops.errors import NotFound


class Term(NamedTuple):
    """A row of the page, without its marks for code and emphasis."""

    word: str
    meaning: str
    see: str
    also: tuple[str, ...]


def _complete_term(incomplete: str) -> list[str]:
    return [term.word for term in _terms() if term.word.startswith(incomplete)]


def glossary(
    term: Annotated[
        list[str] | None, typer.Argument(metavar="TERM", help="A term. [default: all]", autocompletion=_complete_term)
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """Explain the words of opt-ops, each in one sentence.

    Words that others use are found too: `taken out` is explained at excluded.

    Examples:
      opt-ops glossary
      opt-ops glossary retry budget
    """
    terms = _terms()
    if term:
        wanted = " ".join(term).lower()
        by_name = {name.lower(): known for known in reversed(terms) for name in (*known.also, known.word)}
        if wanted not in by_name:
            near = get_close_matches(wanted, by_name, n=1)
            guess = f"; did you mean {by_name[near[0]].word}?" if near else ""
            raise NotFound(f"the glossary has no term {' '.join(term)}{guess}", "opt-ops glossary")
        terms = [by_name[wanted]]
    rows = [
        {"word": each.word, "term": each.word, "meaning": each.meaning, "see": each.see, "also": list(each.also)}
        for each in terms
    ]
    columns = [
        Column("TERM", "word"),
        Column("MEANING", "meaning"),
        Column("SEE", "see"),
        Column("ALSO", "also", wide=True),
    ]
    show("opt-ops/glossary/1", rows, columns, output, header=header)


def _terms() -> list[Term]:
    """The terms in the order of the page."""
    page = Path(str(resources.files("opt_ops") / "glossary.md"))  # where a wheel puts it
    if not page.exists():
        page = Path(__file__).parents[2] / "docs" / "glossary.md"
    rows = [line.split(" | ") for line in re.findall(r"^\| (.+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    cells = [[re.sub(r"[`*]", "", cell) for cell in row] for row in rows[2:]]  # after the heading and its rule
    return [
        Term(word, meaning, see, () if also == "–" else tuple(also.split(", "))) for word, meaning, see, also in cells
    ]
