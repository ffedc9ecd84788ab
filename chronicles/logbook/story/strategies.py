"""What was tried against each class of failure, and what worked."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.story.model import Afterthought, Strategy
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport


def strategies(record: LineageRecord, report: LineageReport, thoughts: Sequence[Afterthought]) -> tuple[Strategy, ...]:
    """A row for each failure class and what was done about it, the commonest first."""
    del record, report, thoughts
    return ()
