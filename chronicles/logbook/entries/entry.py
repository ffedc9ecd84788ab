"""An entry of the logbook, before anybody draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chronicles.record import LineageRecord
from chronicles.wording import minute
from opt_ops.core import events as e

MACHINE = "opt-ops"  # the author of what nobody typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A labelled sentence, with the log line it speaks of, if any. Plain text."""

    label: str
    text: str
    line: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """What a person said of an entry later. The entry itself is never rewritten."""

    seq: int
    ts: float
    author: str
    text: str
    correction: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """An entry. All text is plain, and much of it untrusted: whoever draws it escapes it.

    `stacks` are (ranks, where they were, whether they are the odd ones); `changes` (what, before, after).
    """

    anchor: str
    ts: float
    author: str
    run: str
    qualifier: str
    drill: str | None = None
    incident: Mapping[str, Any] | None = None
    facts: tuple[Fact, ...] = ()
    changes: tuple[tuple[str, str, str], ...] = ()
    spans: tuple[tuple[str, float], ...] = ()
    readbacks: tuple[Mapping[str, Any], ...] = ()
    stacks: tuple[tuple[str, str, bool], ...] = ()
    quote: str = ""
    remarks: tuple[Remark, ...] = ()
    closeup: str = ""  # our SVG of the loss around it

    @property
    def title(self) -> str:
        """`2021-11-28 18:34 UTC [opt-ops]: 12.33 restart after …`."""
        return f"{minute(self.ts)} [{self.author}]: {self.run} {self.qualifier}"


def run_at(record: LineageRecord, ts: float) -> str:
    """The newest run at a time; the lineage before there is one."""
    planned = [run.name for run in record.state.runs.values() if run.planned_at <= ts]
    return planned[-1] if planned else record.lineage


def entry_of(record: LineageRecord, entry: e.Entry, qualifier: str, author: str = MACHINE, **more: Any) -> LogEntry:
    """An entry in the log about a journal entry."""
    run = more.pop("run", None) or run_at(record, entry.ts)
    return LogEntry(anchor=f"e{entry.seq}", ts=entry.ts, author=author, run=run, qualifier=qualifier, **more)
