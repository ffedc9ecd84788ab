"""A lineage as its journal and its telemetry tell it: the one thing that everything in the chronicle is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chronicles.kept_curve import Stretch, stretches
from opt_ops.core.detect.point import Point
from opt_ops.core.events import AttemptIntended, Entry
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.runfolder.journal import read
from opt_ops.runfolder.trainer_files import FileTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that happened to a lineage. Times are seconds since the epoch."""

    lineage: str
    entries: Sequence[Entry]
    remarks: Sequence[str]  # what the journal's reader left out, and why
    state: State
    statuses: Sequence[tuple[float, Status]]  # since when it stood where; a pause that is over is none
    stretches: Sequence[Stretch]
    jobs: Mapping[str, Sequence[str]]  # by attempt: the scheduler's jobs that held its nodes

    @property
    def started(self) -> float | None:
        """When an operator asked for it."""
        return self.state.started_at if self.state.lineage else None

    @property
    def as_of(self) -> float | None:
        """The end of an ended lineage; of a living one the newest sign in journal and telemetry, never the clock."""
        if self.state.ended:
            return self.state.since
        signs = [entry.ts for entry in self.entries[-1:]]
        signs += [part.points[-1].ts for part in self.stretches if part.points]
        return max(signs, default=None)


def load(folder: Path, *, telemetry: bool = True) -> Record:
    """Read the lineage's folder; the ledger needs no telemetry, which is most of it.

    Raises:
        JournalError: the journal cannot be trusted.
    """
    entries, remarks = read(folder / "journal")
    trainer = FileTrainer(folder)
    return _record(folder.name, entries, remarks, trainer.points if telemetry else lambda _: ())


def until(record: Record, ts: float) -> Record:
    """The record as it was at a moment: what came later is not known."""
    parts = {part.attempt: part.points for part in record.stretches}
    entries = [entry for entry in record.entries if entry.ts <= ts]
    points = {name: [point for point in known if point.ts <= ts] for name, known in parts.items()}
    return _record(record.lineage, entries, record.remarks, lambda name: points[name])


def _record(
    name: str, entries: Sequence[Entry], remarks: Sequence[str], points: Callable[[str], Sequence[Point]]
) -> Record:
    state = State()
    statuses: list[tuple[float, Status]] = []
    jobs: dict[str, list[str]] = {}
    for entry in entries:
        state = fold(state, entry)
        stands = _stands(state)
        if not statuses or stands is not statuses[-1][1]:
            statuses.append((entry.ts, stands))
        if isinstance(entry.event, AttemptIntended):
            jobs[entry.event.attempt] = _jobs(state, entry.event.nodes)
    return Record(
        lineage=state.lineage.lineage if state.lineage else name,
        entries=entries,
        remarks=remarks,
        state=state,
        statuses=statuses,
        stretches=stretches(state.attempts, {attempt: points(attempt) for attempt in state.attempts}),
        jobs=jobs,
    )


def _stands(state: State) -> Status:
    """The status; but a pause ends with the request to go on, and what follows is waiting for nodes."""
    resumed = state.status is Status.PAUSED and state.paused is None
    return Status.QUEUED if resumed else state.status


def _jobs(state: State, nodes: Sequence[str]) -> list[str]:
    held = state.held
    return list(dict.fromkeys(job for node in nodes if node in held and (job := held[node].job)))
