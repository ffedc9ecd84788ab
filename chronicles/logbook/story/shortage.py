"""How a time with fewer nodes than asked for is told: from their loss until the asked-for size is back."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.measures import leading
from chronicles.logbook.story.stops import Stop
from chronicles.logbook.story.words import about, capital, day, listed, plural
from chronicles.record import LineageRecord
from chronicles.wording import count, second, short, whole
from opt_ops.core.events import SizeDecided
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.text import moment
from opt_ops.core.told.words import without_codes

_HOUR = 3600.0


def told(
    record: LineageRecord, group: Group, stops: Sequence[Stop], before: Sequence[Stop]
) -> tuple[str, tuple[str, ...]]:
    """Title and paragraphs. `before`: the stops of training before it."""
    wanted = record.state.shape.nodes
    sizes = [(x.ts, x.event.nodes) for x in record.entries if isinstance(x.event, SizeDecided)]
    inside = [(ts, nodes) for ts, nodes in sizes if group.begin <= ts <= group.end + _HOUR]
    lead = leading(group.items)
    longest = max((stop.seconds for stop in stops), default=0.0)
    worst = longest > max((stop.seconds for stop in before), default=0.0)
    stood = f"{about(longest)} without training{', the longest stop so far' if worst else ''}" if longest else ""
    back = inside and inside[-1][1] >= wanted
    lasted = about(group.end - group.begin)
    size = (
        f"all {whole(wanted)} nodes again after {lasted}"
        if back
        else f"still fewer than {whole(wanted)} nodes after {lasted}"
    )
    title = f"{_why(lead)}: {stood + '; ' if stood else ''}{size}"
    first = stops[0].end if stops else group.begin
    told = (_waited(group), _spares(group.items, first), _sizes(inside, wanted), _trained(stops))
    return title, tuple(filter(None, told))


def _why(lead: Item) -> str:
    """`The whole allocation was lost (NODE_FAIL)`."""
    row = lead.row
    if row is None:
        return capital(lead.entry.title)
    if row.kind == FailureClass.ALLOCATION_LOST:
        return f"The whole allocation was lost ({short(row.cause.rpartition(': ')[2], 40)})"
    return capital(without_codes(short(row.cause, 80)))


def _waited(group: Group) -> str:
    """The page that no nodes came."""
    page = next((item for item in group.items if item.is_waiting), None)
    if page is None:
        return ""
    return f"Paged at {second(page.ts)}, after {about(page.ts - group.begin)} without nodes."


def _spares(items: Sequence[Item], until: float) -> str:
    """Machines that came back bad, before anything started on them."""
    rows = [item.row for item in items if item.is_spare and item.row is not None and item.ts <= until]
    names = [node for row in rows for node in row.nodes]
    if not names:
        return ""
    which = listed(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"
    came = f"{capital(plural(len(names), 'returned machine'))} ({which})"
    return f"{came} {'was' if len(names) == 1 else 'were'} bad and excluded before anything started there."


def _sizes(sizes: Sequence[tuple[float, int]], wanted: int) -> str:
    if not sizes:
        return ""
    (since, first), (until, last) = sizes[0], sizes[-1]
    text = f"Training went on with {whole(first)} of {whole(wanted)} nodes from {day(since)} {clock(since)}"
    if len(sizes) == 1:
        return f"{text}."
    again = f"with all {whole(wanted)}" if last >= wanted else f"with {whole(last)}"
    changes = f", after {plural(len(sizes) - 2, 'other change')} of size" if len(sizes) > 2 else ""
    return f"{text}, and {again} from {day(until)} {clock(until)}{changes}."


def _trained(stops: Sequence[Stop]) -> str:
    """How many steps were made meanwhile."""
    if len(stops) < 2 or stops[-1].resumed is None or stops[0].resumed is None:
        return ""
    steps = stops[-1].last_step - stops[0].resumed
    return f"{count(steps, 'step')} were trained meanwhile." if steps > 1 else ""


def clock(ts: float) -> str:
    """`02:54`."""
    return moment(ts).strftime("%H:%M")
