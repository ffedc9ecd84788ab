"""The log as rows of the page: what is shown of an entry, what is inside it, and what later facts say of it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story.model import Afterthought, Story, StoryEntry
from chronicles.report.model import IncidentReport
from chronicles.wording import stamps
from opt_ops.core.text import moment
from opt_ops.core.values import Action

AROUND = 300  # steps on both sides that the button beside an entry shows
_OPEN = 12  # entries of a log so short that its evidence is open from the beginning

KINDS: Mapping[str, str] = {
    "rollback": "Rollbacks",
    "halt": "Halts",
    "people": "People",
    "hardware": "Hardware",
    "loss": "Loss",
    "capacity": "Capacity",
    "drill": "Drills",
    "routine": "Routine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """An entry of the log."""

    told: StoryEntry
    title: str  # without the drill, which stands beside it
    stamp: str
    kinds: Sequence[str]
    entries: Sequence[LogEntry]  # the evidence
    single: LogEntry | None  # the evidence, if it is a single entry
    thoughts: Sequence[tuple[Afterthought, str]]  # with the time
    closeup: str
    incident: IncidentReport | None  # of the closeup
    zoom: tuple[int, int] | None
    drill: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """All entries in the order in which they stand on the page, and how many of each kind there are."""

    rows: Sequence[LogRow]
    oldest_first: bool
    kinds: Sequence[tuple[str, str, int]]  # kind, its name, number
    open: bool
    contents: Sequence[LogRow]
    crowded: bool = False  # what is not large has its rows only, without evidence


@dataclass(frozen=True, slots=True)
class StepAxis:
    """The kept updates in order: when each was made."""

    times: Sequence[float] = ()
    steps: Sequence[int] = ()

    def around(self, told: StoryEntry) -> tuple[int, int] | None:
        """The steps that the button beside an entry shows: those that it is about, and 300 on both sides."""
        if len(self.steps) < 2:
            return None
        known = [entry.incident.stopped_step for entry in told.entries if entry.incident]
        about = [step for step in known if step] or [self._step(entry.ts) for entry in told.entries]
        low, high = max(self.steps[0], min(about) - AROUND), min(self.steps[-1], max(about) + AROUND)
        return (low, high) if low < high else None

    def _step(self, ts: float) -> int:
        return self.steps[max(0, bisect_right(self.times, ts) - 1)]


def log(story: Story, ended: bool, axis: StepAxis) -> Log:
    """The log of a story. A lineage that has ended is read from its beginning."""
    thoughts: dict[str, list[Afterthought]] = {}
    for thought in story.afterthoughts:
        thoughts.setdefault(thought.anchor, []).append(thought)
    times = stamps([entry.begin for entry in story.entries])
    rows = [_row(told, at, thoughts, axis) for told, at in zip(story.entries, times, strict=True)]
    numbers = Counter(kind for each in rows for kind in each.kinds)
    large = [each for each in rows if each.told.large]
    return Log(
        rows=rows if ended else rows[::-1],
        oldest_first=ended,
        kinds=[(kind, name, numbers[kind]) for kind, name in KINDS.items() if numbers[kind]],
        open=len(rows) <= _OPEN,
        contents=(large or rows) if ended else (large or rows)[::-1],
        crowded=story.is_crowded,
    )


def _row(told: StoryEntry, at: str, thoughts: Mapping[str, list[Afterthought]], axis: StepAxis) -> LogRow:
    anchors = dict.fromkeys((told.anchor, *told.members))
    entries = sorted(told.entries, key=lambda entry: entry.ts)
    single = entries[0] if len(entries) == 1 else None
    drills = dict.fromkeys(entry.drill for entry in entries if entry.drill)
    drill = " ".join(drills) if drills and all(entry.drill for entry in entries) else ""
    back = (entry for entry in entries if entry.incident and entry.incident.action == Action.ROLLBACK)
    shown = next(back, None) if told.large else None
    return LogRow(
        told=told,
        title=re.sub(r"^DRILL d\d+: ", "", told.title) if drill else told.title,
        stamp=f"{at} UTC" if single else _span(at, told.end - told.begin, told.end),
        kinds=told.kinds or ("routine",),
        entries=entries,
        single=single,
        thoughts=[(each, _later(told, each)) for anchor in anchors for each in thoughts.get(anchor, ())],
        closeup=shown.closeup if shown else "",
        incident=shown.incident if shown and shown.closeup else None,
        zoom=axis.around(told) if told.large and told.entries else None,
        drill=drill,
    )


def _span(at: str, seconds: float, end: float) -> str:
    """The beginning; of what lasted ten minutes and more also the end, with its date if that is another one."""
    if seconds < 600:
        return f"{at} UTC"
    last = moment(end)
    begun = last - timedelta(seconds=seconds)
    return f"{at} to {last.strftime('%H:%M' if last.date() == begun.date() else '%m-%d %H:%M')} UTC"


def _later(told: StoryEntry, thought: Afterthought) -> str:
    at = moment(thought.at)
    return at.strftime("%H:%M" if at.date() == moment(told.begin).date() else "%m-%d %H:%M")
