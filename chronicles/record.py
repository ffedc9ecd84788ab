"""A lineage as its journal and its telemetry tell it: the one thing that everything in the chronicle is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chronicles.settled import Stretch, stretches
from opt_ops.adapters.runfolder import FileTrainer
from opt_ops.core.events import Entry
from opt_ops.core.fold import fold
from opt_ops.core.run import State, Status
from opt_ops.journal import read


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that happened to a lineage. Times are seconds since the epoch."""

    lineage: str
    entries: Sequence[Entry]
    remarks: Sequence[str]  # what the journal's reader left out, and why
    state: State
    statuses: Sequence[tuple[float, Status]]  # since when it stood where
    stretches: Sequence[Stretch]

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


def load(folder: Path) -> Record:
    """Read the lineage's folder.

    Raises:
        JournalError: the journal cannot be trusted.
    """
    entries, remarks = read(folder / "journal")
    state = State()
    statuses: list[tuple[float, Status]] = []
    for entry in entries:
        before = state.status
        state = fold(state, entry)
        if state.status is not before:
            statuses.append((entry.ts, state.status))
    trainer = FileTrainer(folder)
    points = {name: trainer.points(name) for name in state.attempts}
    return Record(
        lineage=state.lineage.lineage if state.lineage else folder.name,
        entries=entries,
        remarks=remarks,
        state=state,
        statuses=statuses,
        stretches=stretches(state.attempts, points),
    )
