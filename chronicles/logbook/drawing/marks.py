"""The incidents on the step axis, and which of many are named there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from chronicles.logbook.story.model import Story
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.core.failures.classes import title
from opt_ops.core.values import Action

MOST_NAMED = 40  # of more incidents than these, only those of large entries are named


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentMark:
    """An incident on the step axis: the last step before it, and the step that training resumed from."""

    incident: str
    step: int
    resumed: int | None
    quiet: bool  # nothing failed, or nothing was done: a drill, a planned move, a request, advice
    title: str  # what it was, in our words
    named: bool = True  # else it is a tick below the loss: there are too many for a line and a name each

    @property
    def told(self) -> str:
        """What a mark says under the pointer, as HTML. The title of an unknown class may be anything."""
        return escape(f"{self.incident}: {self.title} after step {self.step:,}")


def marks(report: LineageReport, story: Story | None = None) -> list[IncidentMark]:
    """The incidents that have a place on the step axis, in order. Of many, `story` tells which ones are named."""
    placed = [row for row in report.incidents if row.stopped_step is not None]
    named = _named(placed, story) if story and len(placed) > MOST_NAMED else {row.incident for row in placed}
    return [
        IncidentMark(
            incident=row.incident,
            step=row.stopped_step or 0,
            resumed=row.step_resumed,
            quiet=row.drill is not None or row.advisory or not row.is_failure,
            title="data changed" if row.requested and row.evidence.get("data") else title(row.kind),
            named=row.incident in named,
        )
        for row in placed
    ]


def _named(placed: Sequence[IncidentReport], story: Story) -> set[str]:
    """The dearest incident of each large entry; of too many, those that cost most."""
    found: list[IncidentReport] = []
    for entry in story.entries:
        members = [row for row in placed if row.incident in entry.members]
        if entry.large and members:
            found.append(max(members, key=_cost))
    return {row.incident for row in sorted(found, key=_cost, reverse=True)[:MOST_NAMED]}


def _cost(row: IncidentReport) -> tuple[bool, float, int]:
    return row.action in (Action.ROLLBACK, Action.HALT), row.seconds_down or 0.0, row.steps_discarded or 0
