"""Entries of the evidence, folded into the entries of the log."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story.model import Fold, StoryEntry
from chronicles.record import LineageRecord, Moment
from chronicles.report.model import LineageReport


def fold(record: LineageRecord, report: LineageReport, log: Sequence[LogEntry]) -> tuple[StoryEntry, ...]:
    """All entries, oldest first, each in exactly one entry of the story."""
    del record, report
    return tuple(single(entry) for entry in sorted(log, key=lambda entry: entry.ts))


def single(entry: LogEntry) -> StoryEntry:
    """An entry that is not folded."""
    return StoryEntry(
        anchor=entry.anchor,
        begin=Moment(entry.ts),
        end=Moment(entry.ts),
        rule=Fold.SINGLE,
        title=entry.title,
        large=True,
        first=False,
        worst=False,
        steps_lost=entry.incident.steps_discarded if entry.incident else None,
        seconds_down=entry.incident.seconds_down if entry.incident else None,
        members=(entry.anchor,),
        entries=(entry,),
    )
