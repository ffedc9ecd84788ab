"""The phases of an attempt, as ``phases.jsonl`` names them. A watcher needs them to tell a slow save from a hang."""

import time
from enum import StrEnum
from pathlib import Path

from opt_ops.contract.telemetry import LineFile


class PhaseName(StrEnum):
    """What rank 0 is doing."""

    START = "start"
    """Reads data and a checkpoint, builds the model, waits for the other ranks."""

    TOKENS = "tokens"
    """Turns text into tokens, or waits for the process that does. Written again while that progresses."""

    TRAINING = "training"
    """Runs updates."""

    EVALUATION = "evaluation"
    """Measures the loss on validation data."""

    SAVING = "saving"
    """Waits for the previous save and copies the state. Training is held up."""

    ENDING = "ending"
    """Waits for the save in flight after the last update."""


_NAMES = tuple(str(phase) for phase in PhaseName)


class PhaseFile:
    """Writes ``phases.jsonl``: what the attempt is doing.

    Args:
        path: the file. Lines are appended. With None nothing is written; all ranks but rank 0 use that.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = LineFile(path) if path else None
        self._current: str | None = None

    def enter(self, phase: PhaseName | str, step: int | None, *, again: bool = False) -> None:
        """Write that ``phase`` begins, unless the last line says so already.

        Args:
            phase: the phase.
            step: the last update; None while it is unknown.
            again: write the line in any case. It shows that the phase makes progress.

        Raises:
            ValueError: there is no phase of that name.
        """
        if phase not in _NAMES:
            raise ValueError(f"there is no phase {phase!r}; phases are {', '.join(_NAMES)}")
        if self._file and (again or phase != self._current):
            written = self._file.write({"ts": round(time.time(), 6), "phase": str(phase), "step": step})
            self._current = phase if written else None
