"""The phases of a lineage: what changed its course, and the quiet times between.

Borders are rollbacks, changes of settings, halts with their answers, pauses, and the begin and end of a shortage of
nodes. Borders nearer to each other than a share of the wall clock merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from chronicles.logbook.story.items import Kind
from chronicles.logbook.story.model import Fold, StoryEntry

_NEAR = 0.05  # of the wall clock
_WIDER = 1.5  # times, as long as there are too many phases
MOST = 8  # phases


class Weight(IntEnum):
    """What a phase is named after: the heaviest of what happened in it."""

    QUIET = 0
    PEOPLE = 1
    ROLLBACK = 2
    HALT = 3
    SHORTAGE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A time of the lineage, with the entries that began in it."""

    begin: float
    end: float
    entries: tuple[StoryEntry, ...]

    @property
    def weight(self) -> Weight:
        """The heaviest of what happened."""
        return max((weight(entry) for entry in self.entries), default=Weight.QUIET)


def weight(entry: StoryEntry) -> Weight:
    """How much an entry changed the course of the lineage."""
    kinds = set(entry.kinds)
    if Kind.DRILL in kinds:
        return Weight.QUIET
    if entry.rule is Fold.CAPACITY:
        return Weight.SHORTAGE
    if Kind.HALT in kinds:
        return Weight.HALT
    if Kind.ROLLBACK in kinds:
        return Weight.ROLLBACK
    return Weight.PEOPLE if Kind.PEOPLE in kinds and entry.seconds_down else Weight.QUIET


def phases(entries: Sequence[StoryEntry], begin: float, end: float, most: int = MOST) -> list[Phase]:
    """The phases from `begin` to `end`, oldest first, each with the entries that began in it."""
    near = _NEAR
    while True:
        borders = _borders(entries, begin, end, near * (end - begin))
        if len(borders) - 1 <= most:
            return [_phase(entries, since, until, until == end) for since, until in pairwise(borders)]
        near *= _WIDER


def _borders(entries: Sequence[StoryEntry], begin: float, end: float, near: float) -> list[float]:
    """Times at which a phase ends and the next one begins."""
    eras: list[tuple[float, float]] = []
    for entry in entries:
        if weight(entry) is Weight.QUIET:
            continue
        if eras and entry.begin - eras[-1][1] < near:
            eras[-1] = eras[-1][0], max(eras[-1][1], entry.end)
        else:
            eras.append((float(entry.begin), float(entry.end)))
    borders = [begin]
    for since, until in eras:
        if since - borders[-1] >= near:
            borders.append(since)
        if until - borders[-1] >= near and end - until >= near:
            borders.append(until)
    return [*borders, end]


def _phase(entries: Sequence[StoryEntry], begin: float, end: float, last: bool) -> Phase:
    inside = tuple(entry for entry in entries if begin <= entry.begin < end or (last and entry.begin >= end))
    return Phase(begin=begin, end=end, entries=inside)
