"""Afterthoughts on shortages of nodes: what training on fewer nodes gained, and what its restarts cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.wording import count, duration
from opt_ops.core import events as e
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.status import Status

_LONG = 600.0  # seconds: a shorter wait for nodes is no question


def after_shortages(timeline: Timeline) -> Iterator[Afterthought]:
    """One for each shortage that is over, and one for each long wait beside nodes that were held."""
    for begin, end in shortages(timeline):
        yield _on_fewer(timeline, begin, end)
    yield from _waited(timeline)


def shortages(timeline: Timeline) -> list[tuple[e.Entry, float]]:
    """(entry that began it, time of its end) of each time that training went on with fewer nodes, once it is over."""
    found: list[tuple[e.Entry, float]] = []
    record, begun = timeline.record, None
    for entry in record.entries:
        if not isinstance(entry.event, e.SizeDecided):
            continue
        short = entry.event.nodes < record.state.shape.nodes
        if short:
            begun = begun or entry
        elif begun is not None and (over := _full_since(timeline, entry.ts)) is not None:
            found.append((begun, over))
            begun = None
    if begun is not None and record.state.ended and record.as_of is not None:
        found.append((begun, record.as_of))
    return found


def _full_since(timeline: Timeline, decided: float) -> float | None:
    """The first step after it was decided to train on all nodes again; None: it is not made yet."""
    later = (x.first_step_at for x in timeline.record.state.attempts.values() if x.intended_at >= decided)
    return next((at for at in later if at is not None), None)


def trained_between(timeline: Timeline, begin: float, end: float) -> int:
    """By how many steps training advanced between two times."""
    before = [step for ts, _, step in timeline.progress if ts <= begin]
    until = [step for ts, _, step in timeline.progress if ts <= end]
    return max(0, until[-1] - (before[-1] if before else 0)) if until else 0


def _on_fewer(timeline: Timeline, begin: e.Entry, end: float) -> Afterthought:
    gained = trained_between(timeline, begin.ts, end)
    extra = [
        row
        for row in timeline.report.incidents
        if row.kind == FailureClass.NODES_RETURNED and begin.ts <= row.opened <= end
    ]
    lost = sum(row.steps_discarded or 0 for row in extra)
    down = sum(row.seconds_down or 0.0 for row in extra)
    of = timeline.record.state.shape.nodes
    restarts = f"{count(len(extra), 'extra restart')} cost {count(lost, 'step')} and {duration(down)}"
    if not extra:
        restarts = "no extra restart was needed"
    return Afterthought(
        anchor=f"e{begin.seq}",
        at=Moment(end),
        kind=Later.DEARER_THAN_WAITING,
        verdict=Judged.WORKED if gained > lost else Judged.FAILED,
        text=f"In {duration(end - begin.ts)} on fewer than {of} nodes, {count(gained, 'step')} were trained; "
        f"{restarts}. " + ("Waiting would have trained none." if gained > lost else "Waiting would have been cheaper."),
        because=tuple(row.incident for row in extra),
        next=None,
    )


def _waited(timeline: Timeline) -> Iterator[Afterthought]:
    """A long wait for nodes while some were held: what they could have trained."""
    record = timeline.record
    spans = pairwise((*record.statuses, (record.as_of or 0.0, record.state.status)))
    for (begin, status), (end, _) in spans:
        if status not in (Status.QUEUED, Status.PREFLIGHT) or end - begin < _LONG:
            continue
        row = next((each for each in reversed(timeline.report.incidents) if each.opened <= begin), None)
        held = _held(timeline, begin, end, row.excluded if row is not None else ())
        pace = _seconds_per_step(timeline, begin)
        wanted = record.state.shape.nodes
        if row is None or not held or held >= wanted or pace is None:
            continue
        possible = int((end - begin) / pace * held / wanted)
        yield Afterthought(
            anchor=row.incident,
            at=Moment(end),
            kind=Later.DEARER_THAN_WAITING,
            verdict=Judged.OPEN,
            text=f"It waited {duration(end - begin)} with {held} of {wanted} nodes held, and trained nothing. "
            f"At its usual pace these nodes could have trained about {count(possible, 'step')}.",
            because=(),
            next=None,
        )


def _held(timeline: Timeline, begin: float, end: float, excluded: Sequence[str]) -> int:
    """How many nodes were held and fit during all of a time, by what is known of them now."""
    bad = {node.node for node in timeline.report.nodes if node.excluded_by}
    return len(
        {
            node
            for each in timeline.report.allocations
            if each.started is not None and each.started <= begin and (each.ended is None or each.ended >= end)
            for node in each.nodes
            if node not in excluded and node not in bad
        }
    )


def _seconds_per_step(timeline: Timeline, before: float) -> float | None:
    """Of the newest attempt that had trained before a time."""
    known = [x for x in timeline.record.state.attempts.values() if x.intended_at < before and x.last_step_at]
    for attempt in reversed(known):
        steps = (attempt.last_step or 0) - (attempt.first_step or 0)
        if steps > 0 and attempt.first_step_at is not None and attempt.last_step_at is not None:
            return (attempt.last_step_at - attempt.first_step_at) / steps
    return None
