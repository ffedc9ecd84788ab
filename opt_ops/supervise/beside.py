"""Evaluations of checkpoints beside the daemon: one process group at a time, of all lineages, in their order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from opt_ops.contract.exit_codes import EVALUATION_NOT_STARTED
from opt_ops.node.evaluations import EvaluationProcess
from opt_ops.ports import EvaluationOrder

log = logging.getLogger(__name__)


class Place:
    """The one place for an evaluation on the daemon's host."""

    def __init__(self) -> None:
        self.queue: list[BesideDaemon] = []
        """The lineages that want it; the first one has it."""
        self.killed: list[EvaluationProcess] = []

    def reap(self) -> None:
        """Reap what was killed."""
        self.killed = [each for each in self.killed if not each.reap()]


class BesideDaemon:
    """The evaluations of one lineage beside the daemon."""

    def __init__(self, lineage: Path, place: Place) -> None:
        self._lineage = lineage
        self._place = place
        self._process: EvaluationProcess | None = None
        self._wanted = ""
        self._codes: list[tuple[str, int]] = []

    def follow(self, wanted: EvaluationOrder | None) -> None:
        """Start what is wanted when it is its turn, once; end what is no longer wanted."""
        if self._wanted != (wanted.evaluation if wanted is not None else ""):
            self.close()
        self._place.reap()
        self._note_end()
        if wanted is None or self._process is not None or any(name == wanted.evaluation for name, _ in self._codes):
            return
        self._wanted = wanted.evaluation
        if self not in self._place.queue:
            self._place.queue.append(self)
        if self._place.queue[0] is self:
            self._start(wanted)

    def _start(self, wanted: EvaluationOrder) -> None:
        try:
            self._process = EvaluationProcess(self._lineage, wanted.evaluation, wanted.argv, wanted.nice)
        except OSError as error:  # it has failed, and gives its place to the next lineage
            log.warning("%s cannot be started: %s", wanted.evaluation, error)
            self._codes.append((wanted.evaluation, EVALUATION_NOT_STARTED))
            self.close()

    def _note_end(self) -> None:
        if self._process is not None and self._process.reap():
            self._codes.append((self._process.name, self._process.code or 0))
            self.close()

    def ended(self) -> Sequence[tuple[str, int]]:
        """Return the evaluations that ended by themselves since the last call, with their codes."""
        self._note_end()
        ended, self._codes = self._codes, []
        return ended

    def close(self) -> None:
        """End what runs, and give the place to the next lineage."""
        if self._process is not None:
            self._process.kill()
            self._place.killed.append(self._process)
        self._process, self._wanted = None, ""
        if self in self._place.queue:
            self._place.queue.remove(self)
