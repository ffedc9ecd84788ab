"""Page one: what mattered, by phase."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.story.model import Afterthought, Paragraph, StoryEntry, Strategy
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport


def summary(
    record: LineageRecord,
    report: LineageReport,
    folded: Sequence[StoryEntry],
    tried: Sequence[Strategy],
    thoughts: Sequence[Afterthought],
) -> tuple[Paragraph, ...]:
    """The paragraphs of page one, at most 600 words."""
    del record, report, folded, tried, thoughts
    return ()
