"""Which entries are told as one, before anything is said about them: rules F1 (burst), F2 (chain) and F3 (capacity)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from chronicles.logbook.story.items import Item
from chronicles.logbook.story.model import Fold
from chronicles.logbook.story.stops import Stop, Stops
from chronicles.record import LineageRecord
from opt_ops.core.events import SizeDecided

_BURST = 60.0  # seconds between the beginnings of incidents of one class
_NO_PROGRESS = 50  # steps: an attempt that made fewer is told together with what launched it


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Entries that are told as one, oldest first."""

    items: tuple[Item, ...]
    rule: Fold

    @property
    def begin(self) -> float:
        """When the first of them began."""
        return min(item.begin for item in self.items)

    @property
    def ts(self) -> float:
        """When the first entry was written: groups are ordered by it."""
        return self.items[0].ts

    @property
    def end(self) -> float:
        """When the last of them was over."""
        return max(item.end for item in self.items)

    @property
    def stops(self) -> list[int]:
        """The stops of training that its members belong to."""
        return sorted({item.stop for item in self.items if item.stop is not None})


def grouped(record: LineageRecord, items: Sequence[Item], stops: Stops) -> list[Group]:
    """All entries in groups of at least one, oldest first."""
    sets = _Sets(len(items))
    for first, second in _chained(items, stops):
        sets.join(first, second)
    for first, second in _bursts(items):
        sets.join(first, second)
    groups = [Group(items=tuple(items[place] for place in each), rule=Fold.SINGLE) for each in sets.all()]
    named = [Group(items=group.items, rule=_rule(group.items)) for group in groups]
    return sorted(_with_capacity(record, named, stops), key=lambda group: group.items[0].place)


class _Sets:
    """Disjoint sets of places."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def _root(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self._root(first), self._root(second)))
        self._parent[high] = low

    def all(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for place in range(len(self._parent)):
            found.setdefault(self._root(place), []).append(place)
        return list(found.values())


def _chained(items: Sequence[Item], stops: Stops) -> Iterator[tuple[int, int]]:
    """Entries of one stop of training, and of stops with next to no progress between them."""
    by_stop: dict[int, list[Item]] = {}
    for item in items:
        if item.stop is not None and not item.is_note:
            by_stop.setdefault(item.stop, []).append(item)
    for place, members in by_stop.items():
        yield from _of_a_stop(members)
        if place + 1 in by_stop and _made_nothing(stops.all[place], stops.all[place + 1]):
            yield from _failed_again(members, by_stop[place + 1])


def _made_nothing(before: Stop, after: Stop) -> bool:
    """Whether the attempt that ended a stop was launched in it, and ended in the next one with next to no progress."""
    launched = before.before not in before.attempts
    return launched and after.before not in after.attempts and before.made_after < _NO_PROGRESS


def _of_a_stop(members: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """Neighbours. Drills are told with drills only; what has no incident goes with the one before."""
    incidents = [item for item in members if item.row is not None]
    for drill in (True, False):
        same = [item for item in incidents if item.drill is drill]
        yield from ((first.place, second.place) for first, second in pairwise(same))
    for item in members:
        if item.row is None:
            near = [other for other in incidents if other.ts <= item.ts] or incidents or [members[0]]
            yield near[-1].place, item.place


def _failed_again(members: Sequence[Item], after: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """A failure of an attempt that had made next to no progress, with the failure that launched it."""
    before = [item for item in members if item.row is not None]
    for item in after:
        if item.row is not None and item.row.is_failure and not item.is_of_people:
            yield from ((other.place, item.place) for other in before[-1:] if other.drill is item.drill)


def _bursts(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    newest: dict[tuple[str, bool, bool], Item] = {}
    for item in sorted((each for each in items if each.row is not None), key=lambda each: (each.begin, each.place)):
        key = (item.failure, item.drill, item.is_spare)
        before = newest.get(key)
        if before is not None and item.begin - before.begin <= _BURST and not _apart(before, item):
            yield before.place, item.place
        newest[key] = item


def _apart(first: Item, second: Item) -> bool:
    """Two changes of settings are two entries, however near they are, unless the same attempt answers both."""
    either = first.changes_settings or second.changes_settings or first.is_of_people or second.is_of_people
    return either and first.stop != second.stop


def _rule(items: Sequence[Item]) -> Fold:
    if len(items) == 1:
        return Fold.SINGLE
    incidents = [item for item in items if item.row is not None]
    same = len(incidents) == len(items) and len({item.failure for item in incidents}) == 1
    begins = sorted(item.begin for item in incidents)
    near = all(later - before <= _BURST for before, later in pairwise(begins))
    return Fold.BURST if same and near else Fold.CHAIN


# ---- capacity ----------------------------------------------------------------------------------------------------


def _with_capacity(record: LineageRecord, groups: Sequence[Group], stops: Stops) -> Iterator[Group]:
    """While nodes are short, everything that is not told by itself becomes one entry."""
    left = list(groups)
    for begin, end in _shortages(record, stops):
        inside = [g for g in left if begin <= g.ts <= end and not any(item.is_sovereign for item in g.items)]
        if not any(item.is_capacity for group in inside for item in group.items):
            continue
        gone = {group.items[0].place for group in inside}
        left = [group for group in left if group.items[0].place not in gone]
        items = sorted((item for group in inside for item in group.items), key=lambda item: item.place)
        yield Group(items=tuple(items), rule=Fold.CAPACITY if len(items) > 1 else Fold.SINGLE)
    yield from left


def _shortages(record: LineageRecord, stops: Stops) -> Iterator[tuple[float, float]]:
    """From the loss of nodes until the asked-for size is back; of one that lasts, until the end of the journal."""
    if not record.state.lineage:
        return
    wanted, since = record.state.shape.nodes, None
    for entry in record.entries:
        if not isinstance(entry.event, SizeDecided):
            continue
        if entry.event.nodes < wanted and since is None:
            stop = stops.at(entry.ts)
            since = min(entry.ts, stops.all[stop].begin) if stop is not None else entry.ts
        elif entry.event.nodes >= wanted and since is not None:
            stop = stops.at(entry.ts)
            yield since, max(entry.ts, stops.all[stop].end) if stop is not None else entry.ts
            since = None
    if since is not None:
        yield since, record.entries[-1].ts
