"""`logbook.html`: one file that needs no other file and no network. jinja2 escapes all untrusted text.

The page is complete without scripts. Its policy allows two scripts, each by its hash: the reader's controls, and the
values under the pointer and the zoom of the curves.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from chronicles import wording
from chronicles.logbook.drawing.anchors import slug
from chronicles.logbook.drawing.closeup import caption
from chronicles.logbook.drawing.curves import run_color
from chronicles.logbook.drawing.log_rows import StepAxis, log
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import FrontPage
from chronicles.logbook.story.model import Paragraph, Story
from chronicles.report.model import LineageReport
from opt_ops.core.failures.classes import title
from opt_ops.core.state.status import Status
from opt_ops.core.text import printable

_ID = re.compile(r"\b\d+(?:\.\d{2,}-a\d+|-i\d+|(?:\.\d+)?e-\d+)\b")
_UNIT = re.compile(r"(?<=\d) (?=(?:s|min|h|d|%)(?![a-z]))|(?<=×) (?=\d)")
_TEMPLATES = Path(__file__).parent / "templates"


_SCRIPTS = ("controls", "curves")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What is drawn of the curves, without untrusted text."""

    figures: Sequence[str] = ()  # SVG in several widths
    data: str = ""  # JSON of their numbers
    keys: Mapping[str, bool] = field(default_factory=dict[str, bool])  # which marks the legend explains
    phases: Sequence[str] = ()  # an SVG for each paragraph of the story; empty where there is nothing to draw
    scores: Sequence[tuple[str, str]] = ()  # what was measured in words, and its SVG
    axis: StepAxis = field(default_factory=StepAxis)


def logbook(report: LineageReport, front: FrontPage, story: Story, drawn: Drawn) -> str:
    """The page of a lineage: its front page, its story with the entries of its log, and its curves."""
    known = frozenset(row.incident for row in report.incidents)
    environment = page_environment({run.run: place for place, run in enumerate(report.runs)}, known)
    rows = log(story, report.status in (Status.COMPLETED, Status.CANCELLED), drawn.axis)  # a halted one may go on
    scripts = {name: page_part(f"{name}.js") for name in _SCRIPTS}
    return environment.get_template("logbook.html").render(
        report=report,
        front=front,
        story=story,
        paragraphs=_paragraphs(story, drawn.phases),
        log=rows,
        places=_places(report, front, story, bool(drawn.figures)),
        css=ours(page_part("logbook.css")),
        scripts={name: ours(script) for name, script in scripts.items()},
        policy=policy(scripts.values()),
        curves=[ours(svg) for svg in drawn.figures],
        data=ours(drawn.data),
        keys=drawn.keys,
        scores=drawn.scores,
    )


def page_environment(runs: Mapping[str, int], known: frozenset[str] = frozenset()) -> Environment:
    """The templates, with what they write numbers and names by.

    Args:
        runs: the place of each run among the colours.
        known: the incidents to which a name in a sentence is a link.
    """
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
        "clock": lambda ts: wording.second(ts).removesuffix(" UTC"),
        "duration": wording.duration,
        "percent": wording.percent,
        "rate": wording.rate,
        "whole": wording.whole,
        "slug": slug,
        "drawn": ours,
        "bound": _bound,
        "linked": lambda text: _linked(text, known),
        "run_class": lambda run: run_color(runs[run]) if run in runs else "",
        "failure_title": title,
        "where": _where,
        "closeup_caption": caption,
    }
    return environment


def ours(text: str) -> Markup:
    """What stands in a page as it is: our style, our scripts, and drawings of numbers and names of ours."""
    return Markup(text)  # noqa: S704


def page_part(name: str) -> str:
    """A style sheet or a script of the pages."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def policy(scripts: Iterable[str]) -> str:
    """The policy of a page with these scripts: no network, no other script."""
    digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"


def _paragraphs(story: Story, phases: Sequence[str]) -> list[tuple[Paragraph, str, str]]:
    """The paragraphs of page one, each with its small curve and the first entry that it tells of."""
    known = {anchor for told in story.entries for anchor in (*told.members, told.anchor)}
    small = dict(enumerate(phases))
    return [
        (paragraph, small.get(place, ""), next((each for each in paragraph.anchors if each in known), ""))
        for place, paragraph in enumerate(story.summary)
    ]


def _places(report: LineageReport, front: FrontPage, story: Story, curves: bool) -> list[tuple[str, str]]:
    """The sections of the page, in order."""
    every = (
        ("story", "Story", story.summary),
        ("curves", "Curves", curves),
        ("tried", "What was tried", story.strategies),
        ("questions", "Open questions", front.questions),
        ("log", "Log", True),
        ("validation", "Validation loss", front.validation),
        ("evaluations", "Evaluations", front.evaluations.rows),
        ("prompts", "Completed prompts", front.evaluations.prompts),
        ("goodput", "Where the time went", report.ledger.wall_seconds),
        ("incidents", "Incidents", report.incidents),
        ("runs", "Runs", report.runs),
        ("nodes", "Nodes", front.nodes or front.healthy_nodes),
        ("allocations", "Allocations", front.allocations),
    )
    return [(place, name) for place, name, there in every if there]


def _where(entry: LogEntry) -> str:
    """The nodes of an entry's incident; empty if there are none."""
    nodes = entry.incident.nodes if entry.incident else ()
    return wording.nodes(nodes) if nodes else ""


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
