"""Projections of the journal that separate processes draw: the logbook and MLflow.

A projection never holds up the watch: one that hangs is killed, and one that cannot be started is tried again.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

_LIMIT_SECONDS = 900.0  # a render of a lineage of months takes less than a minute; a first MLflow sync takes minutes
_PAUSE_SECONDS = 10.0  # after a start that failed

log = logging.getLogger(__name__)


@dataclass
class Projection:
    """A command that draws a lineage's journal. It runs beside the daemon, one process at a time."""

    arguments: tuple[str, ...]
    every: float
    limit: float = _LIMIT_SECONDS
    process: subprocess.Popen[bytes] | None = None
    ran_at: float = field(default_factory=time.monotonic)
    stale: bool = True
    why: str = ""
    """What is wrong with it; empty if the last process has done its work, or none has run yet."""
    not_before: float = 0.0

    @property
    def name(self) -> str:
        """The command, without its options."""
        return " ".join(self.arguments[2:4] if self.arguments[:1] == ("-c",) else self.arguments[:2])

    def step(self, now: bool) -> None:
        """Start the command if the projection is stale and none runs. With `now`, do not wait for the interval."""
        if self._runs(now):
            return
        due = now or time.monotonic() - self.ran_at >= self.every
        if self.stale and due and time.monotonic() >= self.not_before:
            self._start()

    def _runs(self, now: bool) -> bool:
        """Whether its process still runs; note how it ended, and end it if it hangs."""
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None:
            if time.monotonic() - self.ran_at >= self.limit:
                self._tell(f"did not end in {self.limit:g} s, so it was killed")
                self._signal(signal.SIGKILL)  # again at each step: one that waits for a disk dies later
            return True
        self.process = None
        if code == 0:
            self._tell("")
            return False
        if time.monotonic() - self.ran_at < self.limit:
            self._tell(f"ended with code {code}")
        self.stale = not now  # tried again only while the lineage is supervised
        return False

    def _start(self) -> None:
        command = [sys.executable, "-m", "opt_ops", *self.arguments]
        try:
            self.process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:  # no process or no memory is left: that must not end the watch
            self._tell(f"cannot be started: {error}")
            self.not_before = time.monotonic() + _PAUSE_SECONDS
            return
        self.ran_at, self.stale = time.monotonic(), False

    def _tell(self, why: str) -> None:
        if why and why != self.why:
            log.warning("opt-ops %s %s", " ".join(self.arguments), why)
        self.why = why

    def _signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def close(self) -> None:
        """End its process, with all that it has started. The next daemon draws again."""
        self._signal(signal.SIGTERM)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to draw."""
        return not self.stale and (self.process is None or self.process.poll() is not None)
