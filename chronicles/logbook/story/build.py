"""Builds the story of a lineage: a pure function of its record, report and entries."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story.afterthoughts import afterthoughts
from chronicles.logbook.story.fold import fold
from chronicles.logbook.story.model import Story
from chronicles.logbook.story.strategies import strategies
from chronicles.logbook.story.summary import summary, words
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport


def story(record: LineageRecord, report: LineageReport, log: Sequence[LogEntry]) -> Story:
    """The story of a lineage. `log` is what `entries` gives."""
    thoughts = afterthoughts(record, report)
    tried = strategies(record, report, thoughts)
    folded = fold(record, report, log)
    paragraphs = summary(record, report, folded, tried, thoughts)
    return Story(summary=paragraphs, words=words(paragraphs), entries=folded, strategies=tried, afterthoughts=thoughts)
