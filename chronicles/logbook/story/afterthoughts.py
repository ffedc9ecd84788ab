"""What later facts say of earlier entries."""

from __future__ import annotations

from chronicles.logbook.story.model import Afterthought
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport


def afterthoughts(record: LineageRecord, report: LineageReport) -> tuple[Afterthought, ...]:
    """All afterthoughts of a lineage, oldest first."""
    del record, report
    return ()
