"""When a lineage reached which step, by its journal alone: the same with and without telemetry."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from chronicles.operators import HaltReport
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.core import events as e
from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.decide.retry_budget import failure_step
from opt_ops.core.values import Tier


class Timeline:
    """Facts of a lineage in order, for whoever looks for what came later."""

    def __init__(self, record: LineageRecord, report: LineageReport) -> None:
        self.record, self.report = record, report
        self.order = {name: place for place, name in enumerate(record.state.attempts)}
        self.rows = {row.incident: row for row in report.incidents}

    @cached_property
    def progress(self) -> list[tuple[float, int, int]]:
        """(time, place of the attempt, newest step) of everything that says how far an attempt came."""
        found: list[tuple[float, int, int]] = []
        for entry in self.record.entries:
            match entry.event:
                case e.AttemptProgressed() as event:
                    found.append((event.at, self.order[event.attempt], event.step))
                case e.AttemptEnded(last_step=int() as last) as event:
                    found.append((event.last_step_at or entry.ts, self.order[event.attempt], last))
                case _:
                    pass
        return found

    @cached_property
    def alerts(self) -> list[tuple[e.Entry, e.SignalRaised]]:
        """Alerts that no drill has caused, with their entries in the journal."""
        raised = [(x, x.event) for x in self.record.entries if isinstance(x.event, e.SignalRaised)]
        state = self.record.state
        return [(x, event) for x, event in raised if event.tier is Tier.ALERT and drill_behind(state, event) is None]

    @cached_property
    def of_node(self) -> dict[str, list[e.Entry]]:
        """By node: what was found of it, and whether attempts may start there."""
        found: dict[str, list[e.Entry]] = {}
        for entry in self.record.entries:
            if isinstance(entry.event, (e.NodeJudged, e.NodeExcluded, e.NodeAllowed)):
                found.setdefault(entry.event.node, []).append(entry)
        return found

    def step_of(self, row: IncidentReport) -> int:
        """The step at which it failed, as the journal knows it."""
        return failure_step(self.record.state, self.record.state.incidents[row.incident])

    def before_first_step(self, row: IncidentReport) -> bool:
        """Whether it met an attempt that had not made a step yet."""
        known = self.record.state.attempts.get(row.attempt or "")
        return known is not None and known.first_step is None

    def reached(self, step: int, attempt: str | None) -> float | None:
        """When this attempt or a later one had made a step; None: it has not."""
        first = self.order.get(attempt or "", 0)
        return next((ts for ts, place, newest in self.progress if place >= first and newest >= step), None)

    def newest_step(self, attempt: str | None) -> int:
        """The last step that this attempt or a later one has made; 0: none."""
        first = self.order.get(attempt or "", 0)
        return max((newest for _, place, newest in self.progress if place >= first), default=0)

    def failures_after(self, ts: float) -> Iterator[IncidentReport]:
        """Real failures that were opened later, oldest first."""
        return (row for row in self.report.incidents if row.opened > ts and row.drill is None and row.is_failure)

    def answer_to(self, halt: HaltReport) -> e.Entry | None:
        """The request by which a person answered a halt; None: nobody has."""
        return next((x for x in self.record.entries if x.seq == halt.answered_seq), None)

    def first_attempt_after(self, ts: float) -> str | None:
        """The first attempt that was started later."""
        return next((x.name for x in self.record.state.attempts.values() if x.intended_at >= ts), None)
