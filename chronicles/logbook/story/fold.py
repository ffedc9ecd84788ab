"""Entries of the evidence, folded into the entries of the log.

Bursts, chains and shortages of nodes are told as one (`groups`). Of what is left, everything that is not large is told
by day, and neighbouring days without anything large together. docs/formats.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story import telling
from chronicles.logbook.story.groups import Group, grouped
from chronicles.logbook.story.items import Item, Kind, items_of
from chronicles.logbook.story.measures import Measure, measured
from chronicles.logbook.story.model import Fold, StoryEntry
from chronicles.record import LineageRecord, Moment
from chronicles.report.model import LineageReport

_DAY = 86400.0
_ALIKE = 3  # neighbours whose titles may be alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A group of entries, and what it cost."""

    group: Group
    measure: Measure


def fold(record: LineageRecord, report: LineageReport, log: Sequence[LogEntry]) -> tuple[StoryEntry, ...]:
    """All entries, oldest first, each in exactly one entry of the story."""
    items, stops = items_of(record, report, log)
    groups = grouped(record, items, stops)
    told = [Told(group=group, measure=measure) for group, measure in zip(groups, measured(groups, stops), strict=True)]
    teller = telling.Teller(record, report, stops)
    told = _quiet(_by_day(told))
    found = [_entry(each, teller) for each in told]
    while alike := _repetition([entry.title for entry in found]):
        for first, last in reversed(alike):
            told[first:last] = [joined(told[first:last], Fold.BURST)]
            found[first:last] = [_entry(told[first], teller)]
    return tuple(found)


def _repetition(titles: Sequence[str]) -> list[tuple[int, int]]:
    """The runs of too many neighbours whose titles are alike."""
    found: list[tuple[int, int]] = []
    place = 0
    for _, same in groupby(map(bare, titles)):
        number = len(list(same))
        if number > _ALIKE:
            found.append((place, place + number))
        place += number
    return found


def bare(title: str) -> str:
    """A title without digits and names of nodes: what is left says whether two are alike."""
    return " ".join(re.sub(r"\b[a-z]+-?\d[\w.-]*\b|\d+", " ", title.lower()).split())


def _by_day(told: Sequence[Told]) -> list[Told]:
    """Large groups as they are, all others of a day in one."""
    large = [each for each in told if each.measure.large]
    rest = [each for each in told if not each.measure.large]
    for _, same in groupby(rest, key=lambda each: each.group.ts // _DAY):
        large.append(joined(list(same), Fold.DAY))
    return sorted(large, key=lambda each: each.group.items[0].place)


def _quiet(told: Sequence[Told]) -> list[Told]:
    """Neighbouring days with nothing large in one."""
    eventful = {each.group.ts // _DAY for each in told if each.measure.large}
    found: list[Told] = []
    for each in told:
        calm = not each.measure.large and each.group.ts // _DAY not in eventful
        if calm and found and not found[-1].measure.large and found[-1].group.ts // _DAY not in eventful:
            found[-1] = joined([found[-1], each], Fold.QUIET)
        else:
            found.append(each)
    return found


def joined(parts: Sequence[Told], rule: Fold) -> Told:
    """Several groups as one. One alone stays what it was."""
    if len(parts) == 1:
        return parts[0]
    items = sorted((item for part in parts for item in part.group.items), key=lambda item: item.place)
    steps = [part.measure.steps_lost for part in parts if part.measure.steps_lost is not None]
    seconds = [part.measure.seconds_down for part in parts if part.measure.seconds_down is not None]
    measure = Measure(
        kind=parts[0].measure.kind,
        steps_lost=sum(steps) if steps else None,
        seconds_down=sum(seconds) if seconds else None,
        first=any(part.measure.first for part in parts),
        worst=any(part.measure.worst for part in parts),
        unusual=any(part.measure.unusual for part in parts),
        again=next((part.measure.again for part in parts if part.measure.again), None),
        longest=max(part.measure.longest for part in parts),
        large=any(part.measure.large for part in parts),
    )
    return Told(group=Group(items=tuple(items), rule=rule), measure=measure)


def _entry(told: Told, teller: telling.Teller) -> StoryEntry:
    group, measure = told.group, told.measure
    title, text = teller.tell(group, measure)
    entries = tuple(item.entry for item in group.items)
    return StoryEntry(
        anchor=entries[0].anchor,
        begin=Moment(group.begin),
        end=Moment(group.end),
        rule=group.rule,
        title=title,
        large=measure.large,
        first=measure.first,
        worst=measure.worst,
        steps_lost=measure.steps_lost,
        seconds_down=measure.seconds_down,
        members=tuple(entry.anchor for entry in entries),
        text=text,
        kinds=_kinds(group.items, measure.large),
        entries=entries,
    )


def _kinds(items: Sequence[Item], large: bool) -> tuple[str, ...]:
    present = {kind for item in items for kind in item.kinds()}
    found = [kind.value for kind in Kind if kind in present]
    return (*found, *([] if large and found else [Kind.ROUTINE.value]))
