"""An entry of the logbook, before it is drawn as Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport
from chronicles.wording import minute
from opt_ops.core import events as e

MACHINE = "opt-ops"  # the author of entries that no operator caused


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A labelled sentence, with the log line that it refers to, if any. Plain text."""

    label: str
    text: str
    line: str = ""


class Change(NamedTuple):
    """A setting before and after."""

    what: str
    before: str
    after: str


class StackRow(NamedTuple):
    """Ranks of a hung attempt that were at the same place."""

    ranks: str
    frames: str
    odd: bool


class Trial(NamedTuple):
    """A probe and what it showed."""

    probe: str
    node: str
    showed: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """An operator's later note on an entry. The entry itself is never rewritten."""

    seq: int
    ts: float
    author: str
    text: str
    correction: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """An entry. All text is plain, and much of it untrusted: who draws it must escape it."""

    anchor: str
    ts: float
    author: str
    run: str
    title: str  # what was done, then why
    drill: str | None = None
    incident: IncidentReport | None = None
    facts: tuple[Fact, ...] = ()
    changes: tuple[Change, ...] = ()
    spans: tuple[tuple[str, float], ...] = ()  # of the downtime: (what for, seconds)
    stacks: tuple[StackRow, ...] = ()
    trials: tuple[Trial, ...] = ()
    quote: str = ""
    remarks: tuple[Remark, ...] = ()
    closeup: str = ""  # an SVG of the loss around it
    notable: bool = False  # worth a line in a progress note

    @property
    def heading(self) -> str:
        """`2021-11-28 18:34 UTC [opt-ops]: 12.33 restarted: …`."""
        return f"{minute(self.ts)} [{self.author}]: {self.run} {self.title}"


def run_at(record: LineageRecord, ts: float) -> str:
    """The newest run at a time; the lineage if it has no run yet."""
    planned = [run.name for run in record.state.runs.values() if run.planned_at <= ts]
    return planned[-1] if planned else record.lineage


def entry_of(record: LineageRecord, entry: e.Entry, title: str, author: str = MACHINE, **more: Any) -> LogEntry:
    """The logbook's entry about an entry of the journal."""
    run = more.pop("run", None) or run_at(record, entry.ts)
    return LogEntry(anchor=f"e{entry.seq}", ts=entry.ts, author=author, run=run, title=title, **more)
