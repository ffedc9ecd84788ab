"""`opt-ops glossary`: the words of opt-ops, from the table of docs/glossary.md."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.options import FormatOption, HeaderOption
from opt_ops.cli.output import Column, Format, show
from opt_ops.errors import NotFound


def _complete_term(incomplete: str) -> list[str]:
    return [term for term in _terms() if term.startswith(incomplete)]


def glossary(
    term: Annotated[
        list[str] | None, typer.Argument(metavar="TERM", help="A term. [default: all]", autocompletion=_complete_term)
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """Explain the words of opt-ops, each in one sentence.

    Examples:
      opt-ops glossary
      opt-ops glossary retry budget
    """
    terms = _terms()
    if term:
        wanted = " ".join(term)
        by_lower = {known.lower(): known for known in terms}
        if wanted.lower() not in by_lower:
            near = get_close_matches(wanted.lower(), by_lower, n=1)
            guess = f"; did you mean {by_lower[near[0]]}?" if near else ""
            raise NotFound(f"the glossary has no term {wanted}{guess}", "opt-ops glossary")
        terms = {known: meaning for known, meaning in terms.items() if known.lower() == wanted.lower()}
    rows = [{"term": known, "meaning": meaning} for known, meaning in terms.items()]
    show("opt-ops/glossary/1", rows, [Column("TERM", "term"), Column("MEANING", "meaning")], output, header=header)


def _terms() -> dict[str, str]:
    """Term → meaning, in the order of the page, without the page's marks for code and emphasis."""
    page = Path(str(resources.files("opt_ops") / "glossary.md"))  # where a wheel puts it
    if not page.exists():
        page = Path(__file__).parents[2] / "docs" / "glossary.md"
    lines = re.findall(r"^\| (.+?) \| (.+?) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {_plain(term): _plain(meaning) for term, meaning in lines[2:]}  # after the heading and its rule


def _plain(cell: str) -> str:
    return re.sub(r"[`*]", "", cell)
