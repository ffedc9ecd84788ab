"""The title of an entry of the log, and the sentences below it: the news first, then what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from chronicles.logbook.entries.entry import MACHINE
from chronicles.logbook.story import routine, shortage
from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.measures import Measure, leading
from chronicles.logbook.story.model import Fold
from chronicles.logbook.story.shared import in_common, nodes_of
from chronicles.logbook.story.stops import Stop, Stops
from chronicles.logbook.story.words import (
    about,
    an,
    capital,
    counted,
    listed,
    noun,
    number_word,
    ordinal,
    plural,
    tallied,
)
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, full, nodes, rate, second, short, whole
from opt_ops.core import events as e
from opt_ops.core.failures.grounds import Confidence
from opt_ops.core.text import number_spans
from opt_ops.core.told.words import without_codes
from opt_ops.core.values import Action

ANSWER = "On-call was paged at "
"""Begins the sentence that says when a halt was answered."""
UNKNOWN = "Why is not known."
_SPOKEN = ("started", "paused", "resumed", "rolled back", "changed", "excluded", "allowed", "took over", "handed back")
_SPOKEN += ("declared", "wants")


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
                before = [stop for stop in self.stops.all if stop.end < group.begin]
                return shortage.told(self.record, group, stops, before)
            case Fold.DAY | Fold.QUIET:
                return routine.title(group, measure, stops), ()  # the table of members says it all
            case Fold.CHAIN:
                title = _chain(self.record, group, stops)
            case Fold.BURST:
                title = _burst(group, stops)
            case _:
                title = f"{_single(group.items[0])}{_result(self.record, self.report, group.items[0])}"
        cost = _cost(measure) if leading(group.items).row is not None else ""
        news = self._comparison(group, measure)
        title = f"{title}{f'; {cost}' if cost else ''}"
        return f"{title}. {news}." if news else title, tuple(self._text(group, stops))

    def _comparison(self, group: Group, measure: Measure) -> str:
        """How it compares with what was before."""
        lead = leading(group.items)
        row = lead.row
        if lead.drill or (row is None and not lead.is_alert) or (row is not None and not row.is_failure):
            return ""
        back = row is not None and lead.changes_settings and row.checkpoint_step is not None
        name = "rollback" if back else noun(lead.failure)
        if measure.first:
            return "The first node that was excluded so" if lead.is_spare else f"The first {name} of this lineage"
        if back:
            return self._which_rollback(group)
        if measure.worst and measure.longest >= self._longest_before(group):
            return "The longest downtime so far"
        if measure.worst:
            return f"The worst {name} so far"
        if measure.again:
            node, times = measure.again
            return f"The {ordinal(times)} failure of {node}"
        return f"Longer than {an(lead.failure)} usually takes" if measure.unusual else ""

    def _which_rollback(self, group: Group) -> str:
        before = [
            row.opened
            for row in self.report.incidents
            if row.action is Action.ROLLBACK and not row.advisory and not row.drill and row.opened < group.ts
        ]
        if not before:
            return ""
        return f"The {ordinal(len(before) + 1)} rollback, {about(group.ts - before[-1])} after the one before"

    def _longest_before(self, group: Group) -> float:
        return max((stop.seconds for stop in self.stops.all if stop.end < group.begin), default=0.0)

    def _text(self, group: Group, stops: Sequence[Stop]) -> list[str]:
        lead = leading(group.items)
        found: list[str] = []
        if group.rule is not Fold.SINGLE and lead.row is not None:
            found += _course(group.items)
            found.append(in_common(group.items))
        if lead.row is not None:
            found.append(_where_it_hung(lead.row))
            found.append(lead.row.what_became if group.rule is Fold.SINGLE else "")
        found += [_answered(self.report, item) for item in group.items if isinstance(item.event, e.LineageHalted)]
        if lead.row is not None and lead.changes_settings:
            found.append(full(lead.row.cause, keep=lead.row.nodes) if group.rule is Fold.SINGLE else "")
            found += [_price(self.report, stops), _in_force(lead.row)]
        if stops and stops[-1].over and lead.row is not None:
            found.append(_went_on(self.record, stops[-1]))
        return [sentence for sentence in found if sentence]


_TOLD = 4  # failures of a chain that are told one by one


def _course(items: Sequence[Item]) -> Iterator[str]:
    """What happened, in order: the first failure, then how the others ended."""
    rows = [item.row for item in items if item.row is not None and item.row.is_failure]
    if not rows:
        return
    step = f" at step {whole(rows[0].step_failed)}" if rows[0].step_failed is not None else ""
    yield full(without_codes(f"{rows[0].cause}{step}"), keep=rows[0].nodes)
    later = [without_codes(row.cause) for row in rows[1:]]
    if later:
        more = f" and {plural(len(later) - _TOLD, 'more failure')}" if len(later) > _TOLD else ""
        yield f"Then: {'; '.join(short(cause, 80) for cause in later[:_TOLD])}{more}."
    if any(row.confidence == Confidence.LOW for row in rows):
        yield UNKNOWN


def _where_it_hung(row: IncidentReport) -> str:
    """Where the rank was that the others waited for."""
    taken = row.stacks
    if taken is None or not taken.odd:
        return ""
    odd = set(taken.odd)
    place = next((group for group in taken.groups if group.frames and not odd.isdisjoint(group.ranks)), None)
    rest = next((group for group in taken.groups if group.frames and odd.isdisjoint(group.ranks)), None)
    if place is None:
        return ""
    waited = f" while {count(len(rest.ranks), 'rank')} waited in {short(rest.frames[0], 60)}" if rest else ""
    who = f"{'Rank' if len(odd) == 1 else 'Ranks'} {number_spans(sorted(odd))}"
    return f"{who} ({nodes(taken.nodes)}) stood in {short(place.frames[0], 60)}{waited}."


def _result(record: LineageRecord, report: LineageReport, item: Item) -> str:
    """What began, and how it ended, in the title of the first and the last entry."""
    if isinstance(item.event, e.LineageStarted):
        shape = item.event.shape
        spares = f" and {count(shape.spares, 'spare')}" if shape.spares else ""
        fork = ":" if item.event.parent is not None else ""
        return f"{fork} {short(item.event.recipe, 40)} on {count(shape.nodes, 'node')}{spares}"
    if isinstance(item.event, e.LineageCompleted) and record.started is not None:
        return f": all {count(item.event.step, 'step')} in {about(report.ledger.wall_seconds)}"
    return ""


def _single(item: Item) -> str:
    entry, title = item.entry, item.entry.title
    if item.is_note:
        return f"{short(entry.author, 40)} wrote a {title}: “{short(entry.quote, 80)}”"
    if item.is_spare and item.row is not None:
        why = without_codes(short(item.row.cause.rpartition(": ")[2]))
        return f"{nodes_of([item])} excluded, no rank ran there: {why}"
    if item.is_alert:
        return f"{capital(title.removeprefix('alert, no action: '))}: no action was needed"
    if entry.author == MACHINE:
        return capital(without_codes(title) if item.row is not None else title)
    spoken = title.startswith(_SPOKEN)
    told = f"{short(entry.author, 40)} {title}" if spoken else f"{capital(title)} by {short(entry.author, 40)}"
    return f"{told}: “{short(entry.quote, 80)}”" if entry.quote else told


def _chain(record: LineageRecord, group: Group, stops: Sequence[Stop]) -> str:
    lead = leading(group.items)
    failed = _failed_launches(stops)
    halted = any(item.is_halt for item in group.items)
    if len(failed) > 1 or (failed and halted):
        launched = [record.state.attempts[name] for name in failed]
        span = max((a.ended_at or a.intended_at) for a in launched) - launched[0].intended_at
        outcome = "training halted" if halted else "then one trained again"
        first = group.items[0]
        after = first.row is not None and first.row.attempt not in failed and first.row.is_failure
        what = f"{plural(len(failed), 'launch', 'launches')} failed in {about(span)}: {outcome}"
        return capital(f"{an(first.failure)}, then {what}" if after else what)
    if isinstance(lead.event, e.PauseRequested) and stops:
        why = f": “{short(lead.entry.quote, 80)}”" if lead.entry.quote else ""
        stood = about(sum(stop.seconds for stop in stops))
        return f"{short(lead.entry.author, 40)} paused training for {stood}{why}"
    if lead.changes_settings or lead.row is None or halted:
        others = [item for item in group.items if item is not lead and item.row is not None and item.row.is_failure]
        after = f", after {tallied(item.failure for item in others)}" if others and not halted else ""
        return f"{_single(lead)}{after}"
    stopped = [item for item in group.items if item.row is not None and item.stop is not None]
    return f"{capital(_sequence(stopped))} ({nodes_of(stopped)}): {_remedy(stops)}"


def _sequence(items: Sequence[Item]) -> str:
    """`a bad GPU, then two hangs`."""
    runs = [(kind, len(list(same))) for kind, same in groupby(item.failure for item in items)]
    told = [an(kind) if number == 1 else counted(kind, number) for kind, number in runs]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])}, then {told[-1]}"


def _remedy(stops: Sequence[Stop]) -> str:
    """`one restart`; where all was done in the running attempt, `ranks replaced in place`."""
    launched = {name for stop in stops for name in stop.attempts if name != stop.before}
    if not launched:
        return "ranks replaced in place"
    in_place = any(stop.before in stop.attempts for stop in stops)
    return f"{plural(len(launched), 'restart')}{', and ranks replaced in place' if in_place else ''}"


def _failed_launches(stops: Sequence[Stop]) -> list[str]:
    """Attempts that ended before their first step."""
    return [name for stop in stops for name in (stop.attempts[:-1] if stop.over else stop.attempts)]


def _burst(group: Group, stops: Sequence[Stop]) -> str:
    lead, number = leading(group.items), len(group.items)
    if lead.row is None and not lead.is_alert:  # what people did and wrote, again and again
        return f"{_single(group.items[0])}, and {number_word(number - 1)} more like it within {_within(group)}"
    where = nodes_of(group.items)
    named = f" ({where})" if where else ""
    failed = [item.failure for item in group.items]
    same = len(set(failed)) == 1
    told = f"{capital(counted(lead.failure, number) if same else tallied(failed))} within {_within(group)}{named}"
    if not stops:
        return f"{told}: no rank ran there, training continued" if lead.is_spare else told
    return f"{told}: {_remedy(stops)}"


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
        return f"{ANSWER}{second(halt.at)}. Nobody has answered yet."
    request = next((r for r in report.operator_requests if r.at == halt.answered), None)
    why = f": “{short(request.reason, 120)}”" if request and request.reason else ", without a reason"
    waited = about(halt.answered - halt.at)
    return f"{ANSWER}{second(halt.at)}; {short(halt.answered_by or 'somebody', 40)} answered after {waited}{why}."


def _price(report: LineageReport, stops: Sequence[Stop]) -> str:
    """Steps as time of training, and the standstill."""
    steps = sum(stop.steps_discarded for stop in stops)
    pace = report.ledger.healthy_step_seconds
    if not steps or pace is None:
        return ""
    stood = about(sum(stop.seconds for stop in stops))
    return f"Cost: {count(steps, 'step')} ({about(steps * pace)} of training) and {stood} of downtime."


def _in_force(row: IncidentReport) -> str:
    """What the live optimizer used after a change."""
    known = row.readbacks
    first = row.telling
    if first is None or row.proven is not True:
        return ""
    span = whole(known[0].step) if len(known) == 1 else f"{whole(known[0].step)} to {whole(known[-1].step)}"
    return f"In force: learning rate {rate(first.lr)}, read back from the live optimizer at {span}."


def _went_on(record: LineageRecord, stop: Stop) -> str:
    if stop.before in stop.attempts:  # in place: the sentence on what became of the ranks says it
        return ""
    attempt = record.state.attempts[stop.attempts[-1]] if stop.attempts else None
    where = f"{attempt.name} went on from step {whole(stop.resumed)}" if attempt else "Training went on"
    return f"{where} at {second(stop.end)}."
