"""The last paragraphs of page one: what it cost, what worked and what did not, what is open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from chronicles.logbook.open_questions import questions
from chronicles.logbook.story.model import Afterthought, Paragraph, Strategy
from chronicles.logbook.story.words import about, capital, listed
from chronicles.logbook.tables import cause
from chronicles.report.model import LineageReport
from chronicles.wording import uncapitalized, whole
from opt_ops.core.failures.classes import title
from opt_ops.core.values import Action, Driver

_CAUSES, _BEST, _WORST, _QUESTIONS = 6, 3, 2, 3
_SMALL = 0.02  # of what was lost: a cause below is not named


def paragraphs(
    report: LineageReport, tried: Sequence[Strategy], thoughts: Sequence[Afterthought]
) -> Iterator[Paragraph]:
    """None to four paragraphs."""
    if report.driver is not Driver.SHADOW and (cost := " ".join(_cost(report))):
        yield _paragraph("What it cost.", cost)
    if worked := " ".join(_worked(tried)):
        yield _paragraph("What worked.", worked)
    if failed := " ".join(_not_worked(tried)):
        yield _paragraph("What did not.", failed)
    if left := " ".join(_open(report, thoughts)):
        yield _paragraph("Open.", left)


def _paragraph(title: str, text: str) -> Paragraph:
    return Paragraph(title=title, begin=None, end=None, first_step=None, last_step=None, text=text, anchors=())


def _cost(report: LineageReport) -> Iterator[str]:
    spent = report.ledger
    useful = spent.kept_steps * (spent.healthy_step_seconds or 0.0)
    lost = spent.wall_seconds - useful
    if not useful or lost <= 0:
        return
    rows = [(uncapitalized(cause(each.kind)), each.seconds) for each in spent.lost_by_kind]
    rows.append(("slow steps and saves", spent.seconds_slower_than_healthy or 0.0))
    named = sorted((row for row in rows if row[1] >= _SMALL * lost), key=lambda row: -row[1])[:_CAUSES]
    yield f"{about(lost)} of {about(spent.wall_seconds)}: {', '.join(f'{what} {about(s)}' for what, s in named)}."
    out = [row for row in report.incidents if row.excluded and not row.advisory]
    idle = sum(row.action is Action.EXCLUDE for row in out)
    nodes = sum(len(row.excluded) for row in out)
    if nodes > 1:
        yield f"{whole(nodes)} nodes were excluded{f'; {whole(idle)} of them ran no rank' if idle else ''}."


def _worked(tried: Sequence[Strategy]) -> Iterator[str]:
    """The best strategies, of different classes."""
    best: dict[str, Strategy] = {}
    for row in sorted((row for row in tried if row.worked), key=lambda row: (-row.worked, row.failed)):
        if row.failure not in best and len(best) < _BEST:
            best[row.failure] = row
    for row in best.values():
        often = row.median_seconds_down and row.tried > 1
        took = f", usually in {about(row.median_seconds_down or 0.0)}" if often else ""
        yield f"{title(row.failure)}, {row.strategy}: {whole(row.worked)} of {whole(row.tried)} worked{took}."


def _not_worked(tried: Sequence[Strategy]) -> Iterator[str]:
    bad = [row for row in tried if row.failed or row.not_needed]
    for row in sorted(bad, key=lambda row: (-row.failed - row.not_needed, -row.steps_lost))[:_WORST]:
        what = [f"{whole(row.failed)} of {whole(row.tried)} failed"] if row.failed else []
        what += [f"{whole(row.not_needed)} of {whole(row.tried)} not needed"] if row.not_needed else []
        yield f"{title(row.failure)}, {row.strategy}: {listed(what)}."


def _open(report: LineageReport, thoughts: Sequence[Afterthought]) -> Iterator[str]:
    for question in questions(report, thoughts)[:_QUESTIONS]:
        bare = re.sub(r" The newest is \S+\.", "", question)
        yield capital(re.sub(r"\b\d+-i\d+\b", "an incident", bare))
