"""The states of lineages that this daemon process does not supervise, as their journals say."""

from __future__ import annotations

import math
from pathlib import Path

from opt_ops.core.state.model import State
from opt_ops.ports import Clock
from opt_ops.runfolder import lineages
from opt_ops.runfolder.journal import JournalError

READ_SECONDS = 30.0
"""Between two readings: a journal of months takes seconds to read, and the watch over all lineages waits meanwhile."""


class StatesRead:
    """What was read, and when it is read again. The state of a lineage that is finished stays."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[Path, tuple[State, float]] = {}

    def of(self, path: Path) -> State:
        """The state of a lineage, some seconds old. That of none if its journal cannot be trusted."""
        state, until = self._known.get(path, (State(), -math.inf))
        if self._clock.monotonic() < until:
            return state
        try:
            state = lineages.state(path)
        except JournalError:  # the watch over the lineage tells that
            state = State()
        self._known[path] = state, math.inf if state.finished else self._clock.monotonic() + READ_SECONDS
        return state

    def forget(self, path: Path) -> None:
        """Somebody supervises the lineage here, and knows better."""
        self._known.pop(path, None)
