"""The logbook's entries about the watch itself: what it could not read, and which of its parts failed."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import full, short
from opt_ops.core import events as e

_Found = Iterator[LogEntry]


def left_out(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.InputLeftOut) -> _Found:
    """One entry for each file, and one more when most of it is left out. The first one has the newest numbers."""
    told = [x for x in record.entries if isinstance(x.event, e.InputLeftOut) and _file(x.event) == _file(event)]
    first, newest = told[0], told[-1].event
    others = next((x for x in told if isinstance(x.event, e.InputLeftOut) and x.event.most), None)
    assert isinstance(newest, e.InputLeftOut)
    if entry is not first and entry is not others:
        return
    shown = event if entry is others and entry is not first else newest
    facts = (
        Fact(label="Left out", text=f"{full(shown.text)}; {shown.taken:,} were taken.", line=full(shown.first)),
        Fact(label="File", text=full(shown.file)),
    )
    what = "most of" if event.most else "a part of"
    yield entry_of(record, entry, f"left out {what} {short(event.file, 60)}: not as docs/formats.md says", facts=facts)


def _file(event: e.InputLeftOut) -> tuple[str, str]:
    return event.source, event.file


def failed(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.WatcherFailed) -> _Found:
    """A part of the watch that failed: what it would have seen is not known."""
    facts = (Fact(label="Cause", text=full(event.why)), Fact(label="Effect", text="It is skipped. The others go on."))
    title = f"a part of the watch failed: {short(event.watcher, 60)}"
    yield entry_of(record, entry, title, facts=facts, notable=True)


def recovered(record: LineageRecord, _: LineageReport, entry: e.Entry, event: e.WatcherRecovered) -> _Found:
    """A part of the watch that works again."""
    yield entry_of(record, entry, f"a part of the watch works again: {short(event.watcher, 60)}")
