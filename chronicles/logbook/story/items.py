"""What is folded: an entry of the evidence, with what the rules of folding ask about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story.stops import Stops, stops_of
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.core import events as e
from opt_ops.core.failures import classes
from opt_ops.core.values import Action


class Kind(StrEnum):
    """What an entry is about. Values are those of `data-kind` on the page."""

    ROLLBACK = "rollback"
    HALT = "halt"
    PEOPLE = "people"
    HARDWARE = "hardware"
    LOSS = "loss"
    CAPACITY = "capacity"
    DRILL = "drill"
    ROUTINE = "routine"


_OF_PEOPLE = (
    e.NoteAdded,
    e.StopRequested,
    e.PauseRequested,
    e.ResumeRequested,
    e.ChangeRequested,
    e.ChangesDeclared,
    e.DriverChanged,
    e.NodeExcluded,
    e.NodeAllowed,
    e.LineageStarted,
    e.LineageCancelled,
)
_OF_CAPACITY = (e.SizeDecided, e.AllocationSubmitted, e.AllocationFailed, e.AllocationChanged, e.StrayFound)
_ALWAYS_LARGE = (
    e.LineageHalted,
    e.CheckpointRefused,
    e.AttemptConfigured,
    e.LineageCompleted,
    e.AlertSettled,
    e.InputLeftOut,
    e.WatcherFailed,
    e.WatcherRecovered,
    e.DaemonStarted,
)
_EVALUATIONS = (e.CheckpointEvaluated, e.CheckpointSampled)
_PAGES = (Action.HALT, Action.NOTIFY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An entry of the evidence."""

    place: int  # in the order of the log
    entry: LogEntry
    event: e.Event | None  # behind it; None: an incident
    stop: int | None  # that it belongs to

    @property
    def row(self) -> IncidentReport | None:
        """Its incident."""
        return self.entry.incident

    @property
    def ts(self) -> float:
        """When it was opened or journaled."""
        return self.entry.ts

    @property
    def begin(self) -> float:
        """When it began: an incident with its first evidence."""
        return min(self.row.at, self.ts) if self.row else self.ts

    @property
    def end(self) -> float:
        """When it was over, as far as is known."""
        return max(self.ts, self.row.closed or self.ts) if self.row else self.ts

    @property
    def drill(self) -> bool:
        """Whether a drill did it."""
        return self.entry.drill is not None

    @property
    def failure(self) -> str:
        """Its failure class; of an entry without incident, the kind of its event."""
        if self.row is not None:
            return self.row.kind
        return self.event.signal if isinstance(self.event, e.SignalRaised) else type(self.event).__name__

    @property
    def is_alert(self) -> bool:
        """Whether it is an alert that no action followed."""
        return isinstance(self.event, e.SignalRaised)

    @property
    def is_evaluation(self) -> bool:
        """Whether it is what was measured on a checkpoint."""
        return isinstance(self.event, _EVALUATIONS)

    @property
    def is_spare(self) -> bool:
        """Whether it took out a node on which no rank ran, and nothing else followed."""
        return self.row is not None and self.row.is_spare

    @property
    def changes_settings(self) -> bool:
        """Whether it is a rollback or a change of settings."""
        return self.row is not None and self.row.changes_settings

    @property
    def is_halt(self) -> bool:
        """Whether training ended with it until a person answered."""
        return isinstance(self.event, e.LineageHalted) or (
            self.row is not None and self.row.action is Action.HALT and not self.row.advisory
        )

    @property
    def is_of_people(self) -> bool:
        """Whether a person did or wrote something."""
        if self.entry.remarks or (self.row is not None and (self.row.requested or self.row.advisory)):
            return True
        return isinstance(self.event, _OF_PEOPLE)

    @property
    def is_note(self) -> bool:
        """Whether it is a note of its own."""
        return isinstance(self.event, e.NoteAdded)

    @property
    def is_capacity(self) -> bool:
        """Whether it is about how many nodes there are."""
        if self.row is not None:
            return classes.row(self.row.kind).domain is classes.Domain.PLATFORM
        return isinstance(self.event, _OF_CAPACITY) or self.is_waiting

    @property
    def is_waiting(self) -> bool:
        """Whether it is the page that no nodes come."""
        return isinstance(self.event, e.AlertSettled) and self.event.delivered

    @property
    def is_sovereign(self) -> bool:
        """Whether it is told by itself even while nodes are short."""
        row = self.row
        unproven = row is not None and (row.proven is False or row.closed is None)
        paged = row is not None and row.action in _PAGES
        of_its_own = isinstance(self.event, _ALWAYS_LARGE) and not self.is_waiting
        of_its_own = of_its_own or (self.is_evaluation and self.entry.notable)  # a score fell
        return self.changes_settings or self.is_of_people or self.drill or unproven or paged or of_its_own

    @property
    def is_plainly_large(self) -> bool:
        """Whether it is large whatever else happened."""
        return self.is_sovereign or self.is_waiting

    def kinds(self) -> Iterator[Kind]:
        """For the reader's filter."""
        domain = classes.row(self.row.kind).domain if self.row is not None else None
        if self.changes_settings:
            yield Kind.ROLLBACK
        if self.is_halt:
            yield Kind.HALT
        if self.is_of_people:
            yield Kind.PEOPLE
        if domain is classes.Domain.HARDWARE:
            yield Kind.HARDWARE
        if domain is classes.Domain.LOSS or self.is_alert:
            yield Kind.LOSS
        if self.is_capacity:
            yield Kind.CAPACITY
        if self.drill:
            yield Kind.DRILL


def items_of(record: LineageRecord, report: LineageReport, log: Sequence[LogEntry]) -> tuple[list[Item], Stops]:
    """All entries, oldest first, and the stops of training that they belong to."""
    stops = stops_of(record, report.incidents)
    events = {f"e{entry.seq}": entry.event for entry in record.entries}
    paused = [entry.ts for entry in record.entries if isinstance(entry.event, e.LineagePaused)]
    ordered = list(reversed(log))  # `log` is newest first
    ordered.sort(key=lambda entry: entry.ts)
    found: list[Item] = []
    for place, entry in enumerate(ordered):
        event = events.get(entry.anchor)
        at = entry.ts
        if isinstance(event, e.PauseRequested):  # the attempt saves once more before it ends
            at = next((ts for ts in paused if ts >= at), at)
        stop = stops.by_incident.get(entry.anchor) if entry.incident else _stop_of(event, at, stops)
        found.append(Item(place=place, entry=entry, event=event, stop=stop))
    return found, stops


def _stop_of(event: e.Event | None, ts: float, stops: Stops) -> int | None:
    """The stop that an entry without incident belongs to. A note keeps its place wherever it was written."""
    return None if isinstance(event, (e.NoteAdded, e.SignalRaised, *_EVALUATIONS)) else stops.at(ts)
