"""A phase of a lineage as a paragraph: days, steps and run, its weightiest fact, what stopped training."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from chronicles.ledger.legs import legs_of
from chronicles.logbook.entries.entry import run_at
from chronicles.logbook.front_page import seconds_left
from chronicles.logbook.story.model import Afterthought, Judged, Later, Paragraph, StoryEntry
from chronicles.logbook.story.phases import Phase, Weight, weight
from chronicles.logbook.story.telling import ANSWER, UNKNOWN
from chronicles.logbook.story.words import about, capital, counted, days, listed, number_word, plural
from chronicles.record import LineageRecord, Moment
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, minute, whole
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.text import moment
from opt_ops.core.values import Action, Driver

_LIMIT = 70  # words of a paragraph
_LINKS = 4  # entries that a paragraph leads to
_DAY = 86400.0
_ALERT = "alert, no action: loss spike"  # begins the title of an alert about a jump of the loss
_RESTLESS = 10  # stops a day, more than which nobody calls quiet,
_FEW = 3  # and as many in less than a day
_LONG = 1.5 * _DAY  # without a stop: worth a sentence


class PhaseTeller:
    """Tells the phases of one lineage."""

    def __init__(self, record: LineageRecord, report: LineageReport, thoughts: Sequence[Afterthought]) -> None:
        self.record, self.report, self.thoughts = record, report, thoughts
        reports = sorted((at, step) for leg in legs_of(record.entries, record.state) for step, at in leg.reports)
        self._times, self._steps = [at for at, _ in reports], [step for _, step in reports]

    def told(self, phase: Phase) -> Paragraph:
        """The paragraph."""
        begin = phase.begin == self.record.started
        first = 1 if begin else self._step(phase.begin) + 1
        last = self.report.step if phase.end == self.record.as_of else self._step(phase.end)
        runs = list(dict.fromkeys((run_at(self.record, phase.begin), run_at(self.record, phase.end))))
        when = f"{span(phase.begin, phase.end)}, to step {whole(last)}, run{'s' if len(runs) > 1 else ''}"
        return Paragraph(
            title=f"{when} {' to '.join(runs)}. {self._headline(phase, begin)}.",
            begin=Moment(phase.begin),
            end=Moment(phase.end),
            first_step=first,
            last_step=last,
            text=_within(_LIMIT, self._sentences(phase)) or "Nothing stopped training.",
            anchors=_weightiest(phase),
        )

    def now(self, newest: Paragraph) -> Paragraph:
        """The phase that a live lineage is in: it ends with what is next."""
        return replace(newest, now=True, text=" ".join([newest.text, *self.next()]).strip())

    def next(self) -> list[str]:
        """What comes next, as far as is known."""
        found: list[str] = []
        ends = [a.ends_at for a in self.record.state.live_allocations if a.ends_at is not None]
        if ends:
            found.append(f"The next job reaches its time limit at {minute(min(ends))}.")
        left = None if self.report.driver is Driver.SHADOW else seconds_left(self.report)
        if left is not None and self.report.as_of is not None:
            found.append(f"At this goodput the last step comes at {minute(self.report.as_of + left)}.")
        return found

    def _step(self, ts: float) -> int:
        place = bisect_right(self._times, ts)
        return self._steps[place - 1] if place else 0

    def _headline(self, phase: Phase, first: bool) -> str:
        heavy = [entry for entry in phase.entries if weight(entry) is phase.weight]
        match phase.weight:
            case Weight.SHORTAGE:
                return "All nodes were lost" if _lost_all(heavy) else "Fewer nodes than asked for"
            case Weight.HALT:
                cost = about(sum(entry.seconds_down or 0.0 for entry in heavy))
                only = len(heavy) == 1 == len(self.report.halts)
                return f"The only halt: {cost}" if only else f"{capital(plural(len(heavy), 'halt'))}: {cost}"
            case Weight.ROLLBACK:
                rows = _changes(heavy)
                name = "rollback" if all(row.action is Action.ROLLBACK for row in rows) else "change"
                idle = sum(self._verdict(row) is Judged.NOT_NEEDED for row in rows)
                not_needed = f"; {number_word(idle)} {'was' if idle == 1 else 'were'} not needed" if idle else ""
                span = f" in {about(heavy[-1].begin - heavy[0].begin)}" if len(heavy) > 1 else ""
                return f"{capital(plural(len(rows), name))}{span}{not_needed}"
            case Weight.PEOPLE:
                return heavy[0].title.rstrip(".")
            case _:
                if not first:
                    return f"{_stretch(phase.end - phase.begin)} alone"
                return "A restless beginning" if _restless(phase) else "A quiet beginning"

    def _verdict(self, row: IncidentReport) -> Judged | None:
        return next((each.verdict for each in self.thoughts if each.anchor == row.incident), None)

    def _sentences(self, phase: Phase) -> Iterator[str]:
        heavy = [entry for entry in phase.entries if weight(entry) is not Weight.QUIET]
        rows = _changes(heavy)
        if own := [row for row in rows if not row.requested]:
            yield from self._went_back(own)
        for entry in sorted(heavy, key=weight, reverse=True):  # the weightiest first: there is not room for all
            if weight(entry) is Weight.PEOPLE or any(row.requested for row in _changes([entry])):
                yield f"{entry.title.rstrip('.')}."
            elif weight(entry) is Weight.HALT:
                yield f"{entry.title.partition(';')[0].partition(': training halted')[0].rstrip('.')}."
                yield from (sentence for sentence in entry.text if sentence.startswith((ANSWER, UNKNOWN)))
            elif weight(entry) is Weight.SHORTAGE:
                title = entry.title.rstrip(".")
                yield f"{capital(title.partition(': ')[2]) if _lost_all([entry]) else title}."  # the heading says it
                yield from entry.text if len(heavy) == 1 else ()
        rest = [entry for entry in phase.entries if entry not in heavy]
        yield from self._routine(rest, bool(heavy))
        steps = sum(entry.steps_lost or 0 for entry in rest)
        if steps:
            yield f"{count(steps, 'step').capitalize()} {'was' if steps == 1 else 'were'} discarded."
        quiet = _undisturbed(phase)
        if quiet >= _LONG:
            yield f"The longest time without a stop was {about(quiet)}."

    def _routine(self, entries: Sequence[StoryEntry], besides: bool) -> Iterator[str]:
        members = [each for entry in entries for each in entry.entries]
        rows = [each.incident for each in members if each.incident is not None]
        real = [row for row in rows if row.drill is None and not row.advisory]
        stops = [row for row in real if row.stops_training and row.is_failure]
        if stops:
            tally = Counter(row.kind for row in stops)
            kinds = listed([counted(kind, number) for kind, number in tally.most_common(4)])
            down = [row.seconds_down for row in stops if row.seconds_down is not None]
            usual = f"; usually over in {about(median(down))}" if down else ""
            number = f"{plural(len(stops), 'other stop' if besides else 'stop')}: {kinds}"
            yield f"{capital(kinds if len(tally) == 1 else number)}{usual}."
        jumped = [each.anchor for each in members if each.incident is None and each.title.startswith(_ALERT)]
        if jumped:
            healed = {each.anchor for each in self.thoughts if each.kind is Later.HEALED}
            times = {1: "once", 2: "twice"}.get(len(jumped)) or f"{number_word(len(jumped))} times"
            how = "healed by itself" if healed.issuperset(jumped) else "needed no action"
            yield f"The loss jumped {times} and {how}."
        idle = sum(row.action is Action.EXCLUDE for row in real)
        if idle:
            yield f"{capital(plural(idle, 'node'))} without ranks {'was' if idle == 1 else 'were'} excluded."
        drills = sum(row.drill is not None for row in rows)
        if drills:
            yield f"{capital(plural(drills, 'drill'))}."

    def _went_back(self, rows: Sequence[IncidentReport]) -> Iterator[str]:
        places = [whole(row.step_failed) for row in rows if row.step_failed is not None and not row.requested]
        back = [
            row.steps_discarded for row in rows if row.steps_discarded is not None and row.action is Action.ROLLBACK
        ]
        factors = sorted({row.lr_factor for row in rows if row.lr_factor is not None})
        if places:
            yield f"At {listed(places)} the loss left its band."
        scale = next((run.lr_scale for run in self.report.runs if run.run == rows[-1].run_after), None)
        if back:
            span = whole(min(back)) if min(back) == max(back) else f"{whole(min(back))} to {whole(max(back))}"
            each = "Each time training" if len(rows) > 1 else "Training"
            by = f", learning rate × {listed([f'{factor:g}' for factor in factors])}" if factors else ""
            now = f"; it is × {scale:.3g} of its schedule now" if factors and scale is not None else ""
            yield f"{each} went back {span} steps{by}{now}."
        worked = sum(self._verdict(row) is Judged.WORKED for row in rows)
        if worked:
            of = "All" if worked == len(rows) else f"{capital(number_word(worked))} of {number_word(len(rows))}"
            yield "Training passed the place." if len(rows) == 1 else f"{of} passed the place."


def _weightiest(phase: Phase) -> tuple[str, ...]:
    """The few entries that a reader of the paragraph wants to see next, in their order."""
    large = [entry for entry in phase.entries if entry.large]
    ranked = sorted(large, key=lambda entry: (-weight(entry), -(entry.seconds_down or 0.0)))
    kept = {entry.anchor for entry in ranked[:_LINKS] if weight(entry) is not Weight.QUIET or entry.seconds_down}
    return tuple(entry.anchor for entry in phase.entries if entry.anchor in kept)


def span(begin: float, end: float) -> str:
    """`11 to 20 November`; within a day `18 November, 11:24 to 11:44`."""
    told = days(begin, end)
    within = moment(begin).date() == moment(end).date()
    return f"{told}, {moment(begin).strftime('%H:%M')} to {moment(end).strftime('%H:%M')}" if within else told


def _changes(entries: Sequence[StoryEntry]) -> list[IncidentReport]:
    rows = [each.incident for entry in entries for each in entry.entries if each.incident is not None]
    return [row for row in rows if row.changes_settings]


def _lost_all(entries: Sequence[StoryEntry]) -> bool:
    rows = (each.incident for entry in entries for each in entry.entries)
    return any(row is not None and row.kind == FailureClass.ALLOCATION_LOST for row in rows)


def _restless(phase: Phase) -> bool:
    rows = [each.incident for entry in phase.entries for each in entry.entries if each.incident is not None]
    stops = sum(row.stops_training for row in rows)
    return stops > max(_FEW, _RESTLESS * (phase.end - phase.begin) / _DAY)


def _undisturbed(phase: Phase) -> float:
    """The longest time of a phase in which nothing stopped training."""
    rows = [each.incident for entry in phase.entries for each in entry.entries if each.incident is not None]
    stops = sorted(float(row.at) for row in rows if row.stops_training)
    return max((later - earlier for earlier, later in pairwise([phase.begin, *stops, phase.end])), default=0.0)


def _stretch(seconds: float) -> str:
    whole_days = round(seconds / _DAY)
    return f"{capital(number_word(whole_days))} days" if whole_days > 1 else capital(about(seconds))


def _within(limit: int, sentences: Iterator[str]) -> str:
    """As many sentences as the limit of words allows, in their order; one that is too long is left out."""
    found: list[str] = []
    for sentence in sentences:
        if sum(len(each.split()) for each in [*found, sentence]) <= limit or not found:
            found.append(sentence)
    return " ".join(found)
