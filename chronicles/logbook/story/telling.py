"""The title of an entry of the log, and the sentences below it: the news first, then what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.logbook.entries.entry import MACHINE
from chronicles.logbook.story import routine, shortage
from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.measures import Measure, leading
from chronicles.logbook.story.model import Fold
from chronicles.logbook.story.shared import in_common, nodes_of
from chronicles.logbook.story.stops import Stop, Stops
from chronicles.logbook.story.words import about, an, capital, counted, listed, noun, plural
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, full, rate, second, short, whole
from opt_ops.core import events as e

_SPOKEN = ("started", "paused", "resumed", "rolled back", "changed", "excluded", "allowed", "took over", "handed back")
_SPOKEN += ("declared",)


class Teller:
    """Tells groups of entries of one lineage, oldest first: what was first or worst depends on those before."""

    def __init__(self, record: LineageRecord, report: LineageReport, stops: Stops) -> None:
        self.record, self.report, self.stops = record, report, stops

    def tell(self, group: Group, measure: Measure) -> tuple[str, tuple[str, ...]]:
        """Title and paragraphs, plain text."""
        title, text = self._told(group, measure)
        drills = sorted({item.entry.drill for item in group.items if item.entry.drill})
        return (f"DRILL {listed(drills)}: {title}" if drills else title), text

    def _told(self, group: Group, measure: Measure) -> tuple[str, tuple[str, ...]]:
        stops = [self.stops.all[place] for place in group.stops]
        match group.rule:
            case Fold.CAPACITY:
                return shortage.told(self.record, group, measure, stops)
            case Fold.DAY | Fold.QUIET:
                return routine.title(group, measure, stops), routine.text(group)
            case Fold.CHAIN:
                title = _chain(self.record, group, stops)
            case Fold.BURST:
                title = _burst(group, stops)
            case _:
                title = _single(group.items[0])
        cost = _cost(measure) if leading(group.items).row is not None else ""
        news = self._comparison(group, measure)
        title = f"{title}{f'; {cost}' if cost else ''}"
        return f"{title}. {news}." if news else title, tuple(self._text(group, stops))

    def _comparison(self, group: Group, measure: Measure) -> str:
        """How it compares with what was before."""
        lead = leading(group.items)
        name = "rollback" if lead.changes_settings and lead.row and lead.row.checkpoint_step else noun(lead.failure)
        if lead.row is None and not lead.is_alert:
            return ""
        if lead.row is not None and not lead.row.is_failure:
            return ""
        if measure.first:
            where = " on a node without ranks" if lead.is_spare else ""
            return f"The first {name}{where} of this lineage"
        if measure.worst and measure.seconds_down and measure.seconds_down >= self._longest_before(group):
            return "The longest standstill so far"
        if measure.worst:
            return f"The worst {name} so far"
        if measure.again:
            return f"{measure.again} had failed before"
        return f"Longer than {an(lead.failure)} usually takes" if measure.unusual else ""

    def _longest_before(self, group: Group) -> float:
        return max((stop.seconds for stop in self.stops.all if stop.end < group.begin), default=0.0)

    def _text(self, group: Group, stops: Sequence[Stop]) -> list[str]:
        lead = leading(group.items)
        found: list[str] = []
        if group.rule is not Fold.SINGLE and lead.row is not None:
            found.append(full(lead.row.cause, keep=lead.row.nodes))
        found.append(in_common(group.items) if group.rule is not Fold.SINGLE else "")
        found += [_answered(self.report, item) for item in group.items if isinstance(item.event, e.LineageHalted)]
        if lead.row is not None and lead.changes_settings:
            found.append(_in_force(lead.row))
        if stops and stops[-1].over and lead.row is not None:
            found.append(_went_on(self.record, stops[-1]))
        return [sentence for sentence in found if sentence]


def _single(item: Item) -> str:
    entry, title = item.entry, item.entry.title
    if item.is_note:
        return f"{short(entry.author, 40)} wrote a {title}: “{short(entry.quote, 80)}”"
    if entry.author == MACHINE:
        return capital(title)
    told = (
        f"{short(entry.author, 40)} {title}"
        if title.startswith(_SPOKEN)
        else f"{capital(title)} by {short(entry.author, 40)}"
    )
    return f"{told}: “{short(entry.quote, 80)}”" if entry.quote else told


def _chain(record: LineageRecord, group: Group, stops: Sequence[Stop]) -> str:
    lead = leading(group.items)
    failed = _failed_launches(stops)
    halted = any(item.is_halt for item in group.items)
    if len(failed) > 1 or (failed and halted):
        launched = [record.state.attempts[name] for name in failed]
        span = max((a.ended_at or a.intended_at) for a in launched) - launched[0].intended_at
        outcome = "stopped, on-call was paged" if halted else "then one trained again"
        return f"{capital(plural(len(failed), 'launch', 'launches'))} failed in {about(span)}: {outcome}"
    if lead.changes_settings or lead.row is None:
        others = [item for item in group.items if item is not lead and item.row is not None and item.row.is_failure]
        after = f", after {listed([an(item.failure) for item in others])}" if others else ""
        return f"{_single(lead)}{after}"
    if halted:
        return f"{_single(lead)}"
    kinds = [an(item.failure) for item in group.items if item.row is not None and item.stop is not None]
    launches = sum(len(stop.attempts) for stop in stops)
    told = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])}, then {kinds[-1]}"
    return f"{capital(told)} ({nodes_of(group.items)}): {plural(launches, 'restart')}"


def _failed_launches(stops: Sequence[Stop]) -> list[str]:
    """Attempts that ended before their first step."""
    return [name for stop in stops for name in (stop.attempts[:-1] if stop.over else stop.attempts)]


def _burst(group: Group, stops: Sequence[Stop]) -> str:
    lead, number = leading(group.items), len(group.items)
    where = nodes_of(group.items)
    named = f" ({where})" if where else ""
    told = f"{capital(counted(lead.failure, number))} within {_within(group)}{named}"
    if not stops:
        return f"{told}: no rank ran there, training continued" if lead.is_spare else told
    launches = sum(len(stop.attempts) for stop in stops)
    return f"{told}: {plural(launches, 'restart')}"


def _within(group: Group) -> str:
    begins = [item.begin for item in group.items]
    span = max(begins) - min(begins)
    return "a minute" if span <= 60 else about(span)


def _cost(measure: Measure) -> str:
    parts = [about(measure.seconds_down)] if measure.seconds_down else []
    parts += [count(measure.steps_lost, "step")] if measure.steps_lost else []
    return ", ".join(parts)


def _answered(report: LineageReport, item: Item) -> str:
    """When a halt was answered, and by whom."""
    halt = next((halt for halt in report.halts if f"e{halt.seq}" == item.entry.anchor), None)
    if halt is None:
        return ""
    if halt.answered is None:
        return f"It stopped at {second(halt.at)} and paged. Nobody has answered yet."
    request = next((r for r in report.operator_requests if r.at == halt.answered), None)
    why = f": “{short(request.reason, 120)}”" if request and request.reason else ", without a reason"
    waited = about(halt.answered - halt.at)
    return f"It stopped at {second(halt.at)} and paged. {halt.answered_by} answered after {waited}{why}."


def _in_force(row: IncidentReport) -> str:
    """What the live optimizer used after a change."""
    known = row.readbacks
    first = row.telling
    if first is None or row.proven is not True:
        return ""
    span = whole(known[0].step) if len(known) == 1 else f"{whole(known[0].step)} to {whole(known[-1].step)}"
    return f"In force: learning rate {rate(first.lr)}, read back from the live optimizer at {span}."


def _went_on(record: LineageRecord, stop: Stop) -> str:
    attempt = record.state.attempts[stop.attempts[-1]] if stop.attempts else None
    where = f"{attempt.name} went on from step {whole(stop.resumed)}" if attempt else "Training went on"
    return f"{where} at {second(stop.end)}."
