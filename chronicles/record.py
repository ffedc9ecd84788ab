"""A lineage as its journal and its telemetry record it: everything in the chronicle is drawn from this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chronicles.kept_curve import AttemptCurve, attempt_curves
from opt_ops.core.detect.point import Point
from opt_ops.core.events import AttemptIntended, Entry, MembersIntended
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.runfolder.files import read_json
from opt_ops.runfolder.journal import read
from opt_ops.runfolder.lineages import children


class Moment(float):
    """A time in seconds since the epoch. In JSON it is ISO 8601, unlike a duration."""

    __slots__ = ()


def moment(ts: float | None) -> Moment | None:
    """The time as a `Moment`; None stays None."""
    return None if ts is None else Moment(ts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageRecord:
    """Everything that happened to a lineage. Times are seconds since the epoch."""

    lineage: str
    entries: Sequence[Entry]
    remarks: Sequence[str]  # what the journal's reader skipped, and why
    state: State
    statuses: Sequence[tuple[float, Status]]  # (since, status), in order; a pause ends with the request to resume
    curves: Sequence[AttemptCurve]
    jobs: Mapping[str, Sequence[str]]  # by attempt: the scheduler's jobs that held its nodes
    children: Sequence[str] = ()  # the lineages that were forked from it

    @property
    def started(self) -> float | None:
        """When an operator started the lineage."""
        return self.state.started_at if self.state.lineage else None

    @property
    def as_of(self) -> float | None:
        """When the lineage ended; if it has not, the newest time in journal and telemetry, never the clock."""
        if self.state.ended:
            return self.state.since
        times = [entry.ts for entry in self.entries[-1:]]
        times += [curve.points[-1].ts for curve in self.curves if curve.points]
        return max(times, default=None)


def load(folder: Path, *, telemetry: bool = True) -> LineageRecord:
    """Read a lineage's folder. Telemetry is most of it, and the ledger does not need it.

    Raises:
        JournalError: the journal cannot be trusted.
    """
    entries, remarks = read(folder / "journal")
    if not telemetry:
        return from_entries(folder.name, entries, remarks, lambda _: ())
    from opt_ops.runfolder.trainer_files import FileTrainer  # here, because commands that only look do without it

    record = from_entries(folder.name, entries, remarks, FileTrainer(folder).points)
    return replace(record, children=children(folder))


def newest_config(folder: Path, record: LineageRecord) -> Mapping[str, Any] | None:
    """config.json of the newest attempt that has one; None: none has."""
    files = (folder / attempt_folder(attempt) / "config.json" for attempt in reversed(list(record.state.attempts)))
    return next((found for file in files if isinstance(found := read_json(file), dict)), None)


def until(record: LineageRecord, ts: float, more: Sequence[Entry] = ()) -> LineageRecord:
    """The record as it was at time `ts`, without what came later, and with `more` entries after its last one."""
    known = {curve.attempt: [point for point in curve.points if point.ts <= ts] for curve in record.curves}
    entries = [*(entry for entry in record.entries if entry.ts <= ts), *more]
    return from_entries(record.lineage, entries, record.remarks, lambda attempt: known[attempt])


def from_entries(
    name: str, entries: Sequence[Entry], remarks: Sequence[str], points: Callable[[str], Sequence[Point]]
) -> LineageRecord:
    """The record that these entries of a journal give, with the points of each attempt."""
    state = State()
    statuses: list[tuple[float, Status]] = []
    jobs: dict[str, list[str]] = {}
    for entry in entries:
        state = fold(state, entry)
        status = _status(state)
        if not statuses or status is not statuses[-1][1]:
            statuses.append((entry.ts, status))
        if isinstance(entry.event, AttemptIntended | MembersIntended):
            known = jobs.setdefault(entry.event.attempt, [])
            known += [job for job in _jobs(state, entry.event.nodes) if job not in known]
    return LineageRecord(
        lineage=state.lineage.lineage if state.lineage else name,
        entries=entries,
        remarks=remarks,
        state=state,
        statuses=statuses,
        curves=attempt_curves(state.attempts, {attempt: points(attempt) for attempt in state.attempts}),
        jobs=jobs,
    )


def _status(state: State) -> Status:
    """The state's status; but a pause ends with the request to resume, and what follows is a wait for nodes."""
    resumed = state.status is Status.PAUSED and state.paused is None
    return Status.QUEUED if resumed else state.status


def _jobs(state: State, nodes: Sequence[str]) -> list[str]:
    held = state.held
    return list(dict.fromkeys(job for node in nodes if node in held and (job := held[node].job)))
