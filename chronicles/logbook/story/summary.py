"""Page one: what mattered, by phase, then what it cost, what worked and what is open.

At most 600 words. Numbers are few and round, a rate comes before a list, and no incident is named: who draws the page
links a paragraph to the entries that it tells of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chronicles.logbook.front_page import times
from chronicles.logbook.story import closing
from chronicles.logbook.story.model import Afterthought, Paragraph, StoryEntry, Strategy
from chronicles.logbook.story.phase_words import PhaseTeller
from chronicles.logbook.story.phases import MOST, phases
from chronicles.logbook.story.words import about
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import percent, whole
from opt_ops.core.state.status import Status
from opt_ops.core.values import Driver

_WORDS = 600  # of page one
_FEW = 5  # incidents: below, one paragraph tells everything


def summary(
    record: LineageRecord,
    report: LineageReport,
    folded: Sequence[StoryEntry],
    tried: Sequence[Strategy],
    thoughts: Sequence[Afterthought],
) -> tuple[Paragraph, ...]:
    """The paragraphs of page one: of a lineage that lives the newest phase first, else the oldest."""
    begin, end = record.started, record.as_of
    if begin is None or end is None or not folded or not report.step:
        return ()
    teller = PhaseTeller(record, report, thoughts)
    if sum(row.is_failure for row in report.incidents) < _FEW:
        return (_short(report, folded, teller, thoughts),)
    found: tuple[Paragraph, ...] = ()
    for most in range(MOST, 0, -1):
        told = [teller.told(phase) for phase in phases(folded, begin, end, most)]
        if not report.ended:
            told = [teller.now(told[-1]), *reversed(told[:-1])]
        found = (_head(report), *told, *closing.paragraphs(report, tried, thoughts))
        if words(found) <= _WORDS:
            break
    return found


def words(paragraphs: Sequence[Paragraph]) -> int:
    """How many words they have."""
    return sum(len(f"{each.title} {each.text}".split()) for each in paragraphs)


def _head(report: LineageReport) -> Paragraph:
    return Paragraph(
        title=f"{report.recipe or f'Lineage {report.lineage}'}: {_progress(report)}.",
        begin=report.started,
        end=report.as_of,
        first_step=1,
        last_step=report.step,
        text=" ".join(_figures(report)),
        anchors=(),
    )


def _progress(report: LineageReport) -> str:
    wall = about(report.ledger.wall_seconds)
    of = f" of {whole(report.total_steps)}" if report.total_steps and report.status is not Status.COMPLETED else ""
    return f"{whole(report.step)}{of} steps in {wall}"


def _figures(report: LineageReport) -> Iterator[str]:
    spent = report.ledger
    if spent.goodput is not None and report.driver is not Driver.SHADOW:
        yield f"Goodput {percent(spent.goodput)}."
    pages = spent.involvement.pages
    answered = sum(halt.answered is not None for halt in report.halts)
    if pages:
        by = {0: "never answered", 1: "answered by a person once"}.get(answered) or f"answered {answered} times"
        yield f"On-call was paged {times(pages)}, {by}."
    elif report.ended:
        yield "On-call was never paged."


def _short(
    report: LineageReport, folded: Sequence[StoryEntry], teller: PhaseTeller, thoughts: Sequence[Afterthought]
) -> Paragraph:
    """One paragraph for a lineage to which little has happened."""
    told = [entry for entry in folded if entry.kinds and (entry.steps_lost is not None or entry.large)]
    told = [entry for entry in told if any(each.incident or each.quote for each in entry.entries)][:4]
    sentences = [*_figures(report), *(f"{entry.title.rstrip('.')}." for entry in told)]
    sentences += [thought.text for thought in thoughts if thought.anchor in {each.anchor for each in told}][:2]
    if not told:
        sentences.append("Nothing has happened so far." if not report.ended else "Nothing happened on the way.")
    if not report.ended:
        sentences += teller.next()
    anchors = tuple(entry.anchor for entry in told)
    return replace(_head(report), text=" ".join(sentences), anchors=anchors, now=not report.ended)
