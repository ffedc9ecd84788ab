"""Afterthoughts on nodes: those excluded without need or proof, and those that explain an earlier death."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.report.model import IncidentReport
from chronicles.wording import duration, names, short
from opt_ops.core import events as e
from opt_ops.core.failures.classes import Domain, FailureClass
from opt_ops.core.failures.classes import row as row_of
from opt_ops.core.failures.grounds import Confidence
from opt_ops.core.health.burn_in_findings import BURNING_IN
from opt_ops.core.text import moment
from opt_ops.core.values import Verdict

_DAY = 86400.0  # seconds: of training on a node again, and between a death and what explains it


def after_nodes(timeline: Timeline) -> Iterator[Afterthought]:
    """Afterthoughts on excluded nodes, and on deaths that a later failure of their node explains."""
    excluded = [x for x in timeline.record.entries if isinstance(x.event, e.NodeExcluded)]
    for entry in excluded:
        assert isinstance(entry.event, e.NodeExcluded)
        row = timeline.rows.get(entry.event.incident)
        if row is None or row.drill is None:
            yield from _fit(timeline, entry, entry.event)
    for row in timeline.report.incidents:
        if row.drill is None and row.confidence == Confidence.LOW:
            yield from _never_retested(timeline, row)
            yield from _explained(timeline, row)


def _fit(timeline: Timeline, excluded: e.Entry, event: e.NodeExcluded) -> Iterator[Afterthought]:
    """A node that was excluded and is shown to be fit, before it is excluded again."""
    later = [x for x in timeline.of_node[event.node] if x.seq > excluded.seq]
    again = next((place for place, x in enumerate(later) if isinstance(x.event, e.NodeExcluded)), None)
    found = _tested(later[:again]) or _trained_again(timeline, event.node, later[:again])
    if found is None:
        return
    at, how, because = found
    by = event.incident in timeline.rows
    yield Afterthought(
        anchor=event.incident if by else f"e{excluded.seq}",
        at=Moment(at),
        kind=Later.FIT_AFTER_ALL,
        verdict=Judged.INNOCENT,
        text=f"{short(event.node, 40)} {how}. It was probably innocent.",
        because=because,
        next=None,
    )


_Shown = tuple[float, str, tuple[str, ...]]  # when, how, anchors


def _tested(later: list[e.Entry]) -> _Shown | None:
    """By a test: `node allow --retest`, or a burn-in by its agent. `later`: entries about the node."""
    burning = False
    for entry in later:
        match entry.event:
            case e.NodeAllowed(retested=True):
                return entry.ts, "passed the test before it was allowed again", (f"e{entry.seq}",)
            case e.NodeJudged() as event:
                if burning and event.verdict is Verdict.HEALTHY:
                    return entry.ts, "passed a burn-in", ()
                burning = event.reason == BURNING_IN
            case _:
                pass
    return None


def _trained_again(timeline: Timeline, node: str, later: list[e.Entry]) -> _Shown | None:
    """By a day of training after it was allowed, without a failure of its own."""
    allowed = next((x for x in later if isinstance(x.event, e.NodeAllowed)), None)
    if allowed is None:
        return None
    failed = (each.opened for each in timeline.failures_after(allowed.ts) if node in each.nodes)
    until = min(next(failed, float("inf")), timeline.record.as_of or allowed.ts)
    used = 0.0
    for attempt in timeline.record.state.attempts.values():
        if node not in attempt.nodes or attempt.intended_at < allowed.ts or attempt.first_step_at is None:
            continue
        begin, end = attempt.first_step_at, min(until, attempt.ended_at or until)
        if used + max(0.0, end - begin) >= _DAY:
            how = f"trained for {duration(_DAY)} again without a failure"
            return begin + _DAY - used, how, (f"e{allowed.seq}",)
        used += max(0.0, end - begin)
    return None


def is_retested(timeline: Timeline, node: str, since: float) -> bool:
    """Whether anybody has tested a node, or let it run again, after a time."""
    later = [x for x in timeline.of_node.get(node, []) if x.ts > since]
    return any(isinstance(x.event, e.NodeAllowed) for x in later) or _tested(later) is not None


def _never_retested(timeline: Timeline, row: IncidentReport) -> Iterator[Afterthought]:
    since = row.closed or row.opened
    nodes = [] if row.advisory else [node for node in row.excluded if not is_retested(timeline, node, row.opened)]
    guilty = {node for each in timeline.failures_after(row.opened) for node in each.nodes if _is_hardware(each)}
    nodes = [node for node in nodes if node not in guilty]
    if not nodes:
        return
    one = len(nodes) == 1
    are, them = ("is", "it") if one else ("are", "them")
    lineage = timeline.record.lineage
    yield Afterthought(
        anchor=row.incident,
        at=Moment(timeline.record.as_of or since),
        kind=Later.NEVER_RETESTED,
        verdict=Judged.OPEN,
        text=f"{names(nodes)} {are} still excluded, nothing is proven against {them}, and nobody has tested {them}.",
        because=(),
        next=f"opt-ops node allow {lineage} {nodes[0]} --retest",
    )


def _explained(timeline: Timeline, row: IncidentReport) -> Iterator[Afterthought]:
    if row_of(row.kind).domain is not Domain.PROCESS or not row.nodes:
        return
    for later in timeline.failures_after(row.opened):
        shared = [node for node in row.nodes if node in later.nodes]
        if later.opened - row.opened > _DAY or not shared or not _is_hardware(later):
            continue
        at = moment(later.at).strftime("%H:%M")
        what = "the node, which fell silent" if later.kind == FailureClass.SILENT_NODE else "the GPU that failed"
        yield Afterthought(
            anchor=row.incident,
            at=later.opened,
            kind=Later.EXPLAINED,
            verdict=Judged.EXPLAINED,
            text=f"The cause was probably {what} at {at}: {short(later.cause)}.",
            because=(later.incident,),
            next=None,
        )
        return


def _is_hardware(row: IncidentReport) -> bool:
    return row_of(row.kind).domain is Domain.HARDWARE
