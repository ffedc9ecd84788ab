"""`logbook.html`: one file that needs no other file and no network. jinja2 escapes all untrusted text.

The page works without scripts. Its policy allows one script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from chronicles import wording
from chronicles.logbook.drawing.curves import run_color
from chronicles.logbook.front_page import FrontPage
from chronicles.logbook.story.model import Story
from chronicles.report.model import LineageReport
from opt_ops.core.text import printable

_ID = re.compile(r"\b\d+(?:\.\d{2,}-a\d+|-i\d+|(?:\.\d+)?e-\d+)\b")
_UNIT = re.compile(r"(?<=\d) (?=(?:s|min|h|d|%)(?![a-z]))|(?<=×) (?=\d)")
_TEMPLATES = Path(__file__).parent / "templates"


def logbook(report: LineageReport, front: FrontPage, story: Story, curves: Sequence[str], gaps: bool) -> str:
    """The page.

    Args:
        report: The lineage.
        front: Its front page.
        story: Its story, with the entries of its log.
        curves: SVG in several widths, without untrusted text.
        gaps: Whether any value of the curves is not finite.
    """
    runs = {run.run: place for place, run in enumerate(report.runs)}
    known = frozenset(row.incident for row in report.incidents)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "minute": wording.minute,
        "duration": wording.duration,
        "percent": wording.percent,
        "rate": wording.rate,
        "whole": wording.whole,
        "slug": slug,
        "drawn": Markup,  # closeups hold numbers only
        "bound": _bound,
        "linked": lambda text: _linked(text, known),
        "run_class": lambda run: run_color(runs[run]) if run in runs else "",
    }
    page = environment.get_template("logbook.html")
    css, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("logbook.css", "links.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.render(
        report=report,
        front=front,
        entries=story.evidence,
        css=Markup(css),  # noqa: S704  (ours)
        script=Markup(script),  # noqa: S704  (ours)
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        curves=[Markup(svg) for svg in curves],  # noqa: S704  (numbers and names of incidents)
        gaps=gaps,
    )


def slug(text: str) -> str:
    """The text as an id on the page, without characters that mean something in HTML or a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)


def _clean(value: Any) -> Any:
    """Replace control characters, such as those that turn the direction of writing, in all text of the page."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(printable(line.expandtabs(1)) for line in value.split("\n"))


def _bound(text: str) -> Markup:
    """The text, escaped. A unit stays on the line of its number."""
    return Markup(_UNIT.sub("\N{NO-BREAK SPACE}", str(escape(_clean(text)))))  # noqa: S704  (escaped)


def _linked(text: str, known: frozenset[str]) -> Markup:
    """A sentence, escaped. Attempts, numbers and units stay on one line; incidents are links to their entries."""

    def mark(match: re.Match[str]) -> str:
        name = match[0]
        return (
            f'<a class="id nowrap" href="#{name}">{name}</a>'
            if name in known
            else f'<span class="nowrap">{name}</span>'
        )

    return Markup(_ID.sub(mark, str(_bound(text))))  # noqa: S704  (escaped; a match is digits, dots, hyphens and letters)
