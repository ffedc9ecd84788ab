"""How a time with fewer nodes than asked for is told: from their loss until the asked-for size is back."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.measures import Measure, leading
from chronicles.logbook.story.stops import Stop
from chronicles.logbook.story.words import about, capital, day, listed, plural
from chronicles.record import LineageRecord
from chronicles.wording import count, full, second, short, whole
from opt_ops.core.events import SizeDecided

_HOUR = 3600.0


def told(record: LineageRecord, group: Group, measure: Measure, stops: Sequence[Stop]) -> tuple[str, tuple[str, ...]]:
    """Title and paragraphs."""
    wanted = record.state.shape.nodes
    sizes = [(x.ts, x.event.nodes) for x in record.entries if isinstance(x.event, SizeDecided)]
    inside = [(ts, nodes) for ts, nodes in sizes if group.begin <= ts <= group.end + _HOUR]
    lead = leading(group.items)
    longest = max((stop.seconds for stop in stops), default=0.0)
    why = short(lead.row.cause, 80) if lead.row is not None else lead.entry.title
    stood = f"{about(longest)} without training" if longest else ""
    back = inside and inside[-1][1] >= wanted
    lasted = about(group.end - group.begin)
    size = (
        f"all {whole(wanted)} nodes again after {lasted}"
        if back
        else f"still fewer than {whole(wanted)} nodes after {lasted}"
    )
    title = f"{capital(why)}: {stood + '; ' if stood else ''}{size}"
    return title, tuple(filter(None, (_spares(group.items), _sizes(inside, wanted), _trained(record, group, stops))))


def _spares(items: Sequence[Item]) -> str:
    found = [item.row for item in items if item.is_spare and item.row is not None]
    if not found:
        return ""
    names = [node for row in found for node in row.nodes]
    which = listed(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"
    return (
        f"{capital(plural(len(found), 'node'))} without ranks were taken out ({which}) before anything started there."
    )


def _sizes(sizes: Sequence[tuple[float, int]], wanted: int) -> str:
    if not sizes:
        return ""
    changes = [f"{whole(nodes)} from {day(ts)} {second(ts).removesuffix(' UTC')[:5]}" for ts, nodes in sizes]
    return full(f"nodes of {whole(wanted)}: {', '.join(changes)}")


def _trained(record: LineageRecord, group: Group, stops: Sequence[Stop]) -> str:
    """How many steps were made meanwhile."""
    if len(stops) < 2 or stops[-1].resumed is None or stops[0].resumed is None:
        return ""
    steps = stops[-1].last_step - stops[0].resumed
    return f"{count(steps, 'step')} were trained meanwhile." if steps > 0 else ""
