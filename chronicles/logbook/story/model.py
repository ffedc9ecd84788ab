"""The story as dataclasses: `story` in report.json. docs/formats.md defines every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from chronicles.logbook.entries.entry import LogEntry
from chronicles.record import Moment

_INTERNAL = {"key": ""}  # no field of report.json

CROWDED = 300
"""Incidents of one logbook. Of more, nobody reads each: routine has a row in a table, and its evidence is in
report.json and in the journal (`opt-ops explain`). That a node failed again is news only if none had failed so often.
"""


class Fold(StrEnum):
    """By which rule entries are told as one."""

    SINGLE = "single"  # not folded
    BURST = "burst"  # of one class, begun within a minute
    CHAIN = "chain"  # answered by the same attempt, or attempts that made no progress and what launched them
    CAPACITY = "capacity"  # from the loss of nodes until the asked-for size is back
    DAY = "day"  # routine of a day
    QUIET = "quiet"  # neighbouring days with routine only


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryEntry:
    """One entry of the log as it is read: an entry of the evidence, or several that are told as one."""

    anchor: str
    begin: Moment = field(metadata={"key": "from"})
    end: Moment = field(metadata={"key": "to"})
    rule: Fold
    title: str
    large: bool  # never folded into routine
    first: bool  # of its class in this lineage
    worst: bool  # of its class so far
    steps_lost: int | None
    seconds_down: float | None
    members: tuple[str, ...]  # anchors of the evidence; every anchor is in exactly one story entry
    text: tuple[str, ...] = field(default=(), metadata=_INTERNAL)  # paragraphs below the title, plain text
    kinds: tuple[str, ...] = field(default=(), metadata=_INTERNAL)  # for the reader's filter, as `data-kind` has them
    entries: tuple[LogEntry, ...] = field(default=(), metadata=_INTERNAL)  # of the members, oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """A paragraph of page one: a phase of the lineage, what it cost, what worked, or what is open."""

    title: str
    begin: Moment | None = field(metadata={"key": "from"})
    end: Moment | None = field(metadata={"key": "to"})
    first_step: int | None
    last_step: int | None
    text: str
    anchors: tuple[str, ...]  # of the story entries that it tells of
    now: bool = field(default=False, metadata=_INTERNAL)  # the phase that a live lineage is in


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A failure class and what was done about it, over all incidents without drills, with the outcomes."""

    failure: str
    strategy: str
    tried: int
    worked: int
    failed: int
    not_needed: int
    open: int
    median_seconds_down: float | None
    steps_lost: int
    incidents: tuple[str, ...]
    text: str


class Later(StrEnum):
    """What a later fact shows of an earlier entry."""

    HEALED_AGAIN = "healed_again"  # the jump that was rolled back came again, and healed by itself
    PASSED = "passed"  # training passed the place of the divergence
    CAME_BACK = "came_back"  # it diverged there again
    NEVER_RETURNED = "never_returned"  # the cause of a halt has not come again
    RETURNED = "returned"  # it has
    FIT_AFTER_ALL = "fit_after_all"  # an excluded node passed a test, or trained for a day
    NEVER_RETESTED = "never_retested"  # a node is excluded without proof, and nobody has tested it
    EXPLAINED = "explained"  # the node of a death without a known cause failed soon after it
    HEALED = "healed"  # an alert without an incident
    REFUSED = "refused"  # a recovery that was proposed and not done: whether that was right, or what it cost
    DEARER_THAN_WAITING = "dearer_than_waiting"  # whether training on fewer nodes was worth its restarts


class Judged(StrEnum):
    """The verdict of an afterthought."""

    NOT_NEEDED = "not_needed"
    WORKED = "worked"
    FAILED = "failed"
    WENT_AWAY = "went_away"
    INNOCENT = "innocent"
    OPEN = "open"
    EXPLAINED = "explained"
    HEALED = "healed"
    RIGHT = "right"
    COSTLY = "costly"


@dataclass(frozen=True, slots=True, kw_only=True)
class Afterthought:
    """What later facts say of an earlier entry. The entry itself is never rewritten."""

    anchor: str
    at: Moment  # of the fact that decides
    kind: Later
    verdict: Judged
    text: str
    because: tuple[str, ...]  # anchors
    next: str | None  # a command


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What a reader needs first."""

    summary: tuple[Paragraph, ...]
    words: int  # of page one
    entries: tuple[StoryEntry, ...]  # oldest first
    strategies: tuple[Strategy, ...]
    afterthoughts: tuple[Afterthought, ...]

    @property
    def is_crowded(self) -> bool:
        """Whether there are so many incidents that routine is told without its evidence."""
        return sum(entry.incident is not None for told in self.entries for entry in told.entries) > CROWDED

    @property
    def evidence(self) -> list[LogEntry]:
        """All entries of the evidence, newest first."""
        known = [entry for told in reversed(self.entries) for entry in reversed(told.entries)]
        return sorted(known, key=lambda entry: -entry.ts)
