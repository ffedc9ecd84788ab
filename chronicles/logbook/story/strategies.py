"""What was tried against each class of failure, and what worked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from chronicles.logbook.story.after_shortages import shortages, trained_between
from chronicles.logbook.story.model import Afterthought, Judged, Later, Strategy
from chronicles.logbook.story.outcomes import WAITED, Outcome, Try, by_people, tries, waits
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import count, duration, whole
from opt_ops.core import events as e

FEWER_NODES = "fewer_nodes"  # no failure class: what a lost allocation or node leaves behind


def strategies(record: LineageRecord, report: LineageReport, thoughts: Sequence[Afterthought]) -> tuple[Strategy, ...]:
    """A row for each failure class and what was done about it, the commonest first. Drills do not count."""
    timeline = Timeline(record, report)
    known = {(each.anchor, each.kind): each for each in thoughts}
    found: dict[tuple[str, str], list[Try]] = {}
    for one in (*tries(timeline, known), *waits(timeline, known), *by_people(timeline, known)):
        found.setdefault((one.failure, one.strategy), []).append(one)
    rows = [_row(tried) for tried in found.values()]
    return tuple(sorted((*rows, *_on_fewer_nodes(timeline, thoughts)), key=lambda row: -row.tried))


def _row(tried: Sequence[Try]) -> Strategy:
    counts = {outcome: sum(one.outcome is outcome for one in tried) for outcome in Outcome}
    down = [one.seconds_down for one in tried if one.seconds_down is not None]
    return Strategy(
        failure=tried[0].failure,
        strategy=_named(tried),
        tried=len(tried),
        worked=counts[Outcome.WORKED],
        failed=counts[Outcome.FAILED],
        not_needed=counts[Outcome.NOT_NEEDED],
        open=counts[Outcome.OPEN],
        median_seconds_down=median(down) if down else None,
        steps_lost=sum({one.attempt or one.anchor: one.steps_lost for one in tried}.values()),
        incidents=tuple(one.anchor for one in tried),
        text=". ".join([_outcome(tried, counts), *_cost(tried)]) + ".",
    )


def _named(tried: Sequence[Try]) -> str:
    distances = [one.distance for one in tried if one.distance is not None]
    name = tried[0].strategy
    if not distances:
        return name
    about = round(median(distances), -1) or 1
    return name.replace("rolled back", f"rolled back to about {count(int(about), 'step')} before it", 1)


def _outcome(tried: Sequence[Try], counts: dict[Outcome, int]) -> str:
    """`8 of 12 worked; 4 failed, 1 of them called a person`."""
    of, called = len(tried), sum(one.called for one in tried)
    verb = "healed" if tried[0].strategy == WAITED else "worked"
    parts = [f"{counts[Outcome.WORKED]} of {of} {verb}"]
    if failed := counts[Outcome.FAILED]:
        person = f", and a person was called {'once' if called == 1 else f'{called} times'}" if called else ""
        parts.append(f"{failed} failed{person}")
    if idle := counts[Outcome.NOT_NEEDED]:
        parts.append(f"{idle} {'was' if idle == 1 else 'were'} not needed")
    if left := counts[Outcome.OPEN]:
        parts.append(f"{left} cut short" if tried[0].strategy == WAITED else f"{left} not known yet")
    return "; ".join(parts)


def _cost(tried: Sequence[Try]) -> Iterator[str]:
    """What a try that worked usually cost, and what it cost where no spare was left.

    Failures in a row are one standstill, which each of them counts: those that failed say nothing here.
    """
    tried = [one for one in tried if one.outcome is not Outcome.FAILED]
    usual = [one for one in tried if not one.queued] or list(tried)
    down = [one.seconds_down for one in usual if one.seconds_down is not None]
    if down and max(down) <= 0 and not any(one.steps_lost for one in tried):
        yield "No stop, no step discarded"
        return
    if not down:
        return
    typical = f"{'Usually ' if len(down) > 1 else ''}{duration(median(down))} of downtime"
    yield f"{typical} and {_range([one.steps_lost for one in usual])}"
    waited = [one.seconds_down for one in tried if one.queued and one.seconds_down is not None]
    if waited and len(waited) < len(tried):
        times = "once, when" if len(waited) == 1 else f"the {len(waited)} times that"
        yield f"{duration(median(waited))} {times} no spare was left"


def _range(steps: Sequence[int]) -> str:
    """`1 to 6 steps discarded`, without the tenth at either end."""
    ordered = sorted(steps)
    cut = len(ordered) // 10
    low, high = ordered[cut], ordered[-1 - cut]
    if not high:
        return "no step discarded"
    return f"{count(low, 'step')} discarded" if low == high else f"{whole(low)} to {count(high, 'step')} discarded"


def _on_fewer_nodes(timeline: Timeline, thoughts: Sequence[Afterthought]) -> Iterator[Strategy]:
    """Training on fewer nodes than were asked for, over all shortages."""
    judged = [each for each in thoughts if each.kind is Later.DEARER_THAN_WAITING and each.verdict is not Judged.OPEN]
    spans = shortages(timeline)
    if not judged or not spans:
        return
    of = timeline.record.state.shape.nodes
    sizes = [
        entry.event.nodes
        for entry in timeline.record.entries
        if isinstance(entry.event, e.SizeDecided) and entry.event.nodes < of
    ]
    extra = [timeline.rows[name] for each in judged for name in each.because]
    gained = sum(trained_between(timeline, begin.ts, end) for begin, end in spans)
    worked = sum(each.verdict is Judged.WORKED for each in judged)
    lost = sum(row.steps_discarded or 0 for row in extra)
    took = duration(sum(end - begin.ts for begin, end in spans))
    low, high = min(sizes), max(sizes)
    how = whole(low) if low == high else f"{low} to {high}"
    down = [row.seconds_down for row in extra if row.seconds_down is not None]
    yield Strategy(
        failure=FEWER_NODES,
        strategy=f"trained on {how} of {of} nodes for {took}",
        tried=len(judged),
        worked=worked,
        failed=len(judged) - worked,
        not_needed=0,
        open=0,
        median_seconds_down=median(down) if down else None,
        steps_lost=lost,
        incidents=tuple(each.anchor for each in judged),
        text=f"{worked} of {len(judged)} worked: {count(gained, 'step')} instead of none; "
        f"{count(len(extra), 'extra restart')} discarded {count(lost, 'step')}.",
    )
