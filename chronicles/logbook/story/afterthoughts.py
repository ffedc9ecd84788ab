"""What later facts say of earlier entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chronicles.logbook.story.after_alerts import after_alerts
from chronicles.logbook.story.after_halts import after_halts
from chronicles.logbook.story.after_nodes import after_nodes
from chronicles.logbook.story.after_refusals import after_refusals
from chronicles.logbook.story.after_rollbacks import after_rollbacks
from chronicles.logbook.story.after_shortages import after_shortages
from chronicles.logbook.story.model import Afterthought, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import LineageRecord
from chronicles.report.model import AfterthoughtReport, IncidentReport, LineageReport
from opt_ops.core.decide.afterthoughts import Topic

_TOLD_BY: Mapping[str, Later] = {
    Topic.CAME_AGAIN: Later.CAME_BACK,
    Topic.CURED: Later.PASSED,
    Topic.NOT_NEEDED: Later.HEALED_AGAIN,
}

_RULES = (after_rollbacks, after_refusals, after_halts, after_nodes, after_alerts, after_shortages)


def afterthoughts(record: LineageRecord, report: LineageReport) -> tuple[Afterthought, ...]:
    """All afterthoughts of a lineage, oldest first. Drills are never judged.

    Those on incidents rest on the journal alone: `opt-ops run explain`, which reads no telemetry, says the same.
    """
    timeline = Timeline(record, report)
    found = [thought for rule in _RULES for thought in rule(timeline)]
    return tuple(sorted(found, key=lambda thought: (thought.at, thought.anchor, thought.kind)))


def on(incident: str, thoughts: Sequence[Afterthought]) -> tuple[Afterthought, ...]:
    """The afterthoughts on one incident."""
    return tuple(each for each in thoughts if each.anchor == incident)


def journaled_only(row: IncidentReport, thoughts: Sequence[Afterthought]) -> tuple[AfterthoughtReport, ...]:
    """Those of the journal's own afterthoughts on an incident that none of these tells."""
    told = {each.kind for each in on(row.incident, thoughts)}
    return tuple(each for each in row.afterthoughts if _TOLD_BY.get(each.topic) not in told)
