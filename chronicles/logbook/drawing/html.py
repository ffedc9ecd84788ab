"""`logbook.html`: one file that needs nothing else and no network. jinja2 escapes everything untrusted.

It works without scripts; the page's policy allows one, known by its hash, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from chronicles import wording
from chronicles.logbook.drawing.figure import RUN_COLORS
from chronicles.logbook.entries.entry import LogEntry
from opt_ops.core.text import printable

_ID = re.compile(r"\b\d+(?:\.\d{2,}-a\d+|-i\d+|(?:\.\d+)?e-\d+)\b")
_UNIT = re.compile(r"(?<=\d) (?=(?:s|min|h|d|%)(?![a-z]))|(?<=×) (?=\d)")
_TEMPLATES = Path(__file__).parent / "templates"


def render(
    report: Mapping[str, Any], front: Mapping[str, Any], entries: Sequence[LogEntry], curves: Sequence[str]
) -> str:
    """The page. `curves` are SVG of several widths, drawn by us and without any text of others."""
    runs = {row["run"]: place for place, row in enumerate(report["runs"])}
    known = frozenset(row["incident"] for row in report["incidents"])
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
        "drawn": Markup,  # of numbers alone, by ourselves
        "bound": _bound,
        "told": lambda text: _told(text, known),
        "run_class": lambda run: f"run-{runs[run] % RUN_COLORS}" if run in runs else "",
    }
    page = environment.get_template("logbook.html")
    css, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("logbook.css", "links.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.render(
        report=report,
        front=front,
        entries=entries,
        css=Markup(css),  # noqa: S704  (ours)
        script=Markup(script),  # noqa: S704  (ours)
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        curves=[Markup(svg) for svg in curves],  # noqa: S704  (ours)
    )


def slug(text: str) -> str:
    """An id for a place on the page."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)


def _clean(value: Any) -> Any:
    """No text reaches the page with control characters, such as those that turn the direction of writing."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(printable(line.expandtabs(1)) for line in value.split("\n"))


def _bound(text: str) -> Markup:
    """Escaped, and with units on the line of their number."""
    return Markup(_UNIT.sub("\N{NO-BREAK SPACE}", str(escape(_clean(text)))))  # noqa: S704  (escaped)


def _told(text: str, known: frozenset[str]) -> Markup:
    """A sentence, escaped: attempts, numbers and units stay on their line, incidents are links to their entries."""

    def mark(match: re.Match[str]) -> str:
        name = match[0]
        return (
            f'<a class="id nowrap" href="#{name}">{name}</a>'
            if name in known
            else f'<span class="nowrap">{name}</span>'
        )

    return Markup(_ID.sub(mark, str(_bound(text))))  # noqa: S704  (escaped; a match is digits, dots, hyphens and letters)
