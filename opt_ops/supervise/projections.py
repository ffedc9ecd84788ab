"""Projections of the journal that processes of their own draw: the logbook, MLflow."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass
class Projection:
    """A command that draws something from a lineage's journal, run beside the daemon, one at a time."""

    arguments: tuple[str, ...]
    every: float
    process: subprocess.Popen[bytes] | None = None
    ran_at: float = field(default_factory=time.monotonic)
    stale: bool = True

    def step(self, now: bool) -> None:
        """Start it when it is due and not running; `now` does not wait for the interval."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None and self.process.returncode != 0:
            log.warning("opt-ops %s ended with code %s", " ".join(self.arguments), self.process.returncode)
            self.stale = not now  # while the lineage lives it is tried again; after that, by whoever wants it
        self.process = None
        if self.stale and (now or time.monotonic() - self.ran_at >= self.every):
            self.process = subprocess.Popen([sys.executable, "-m", "opt_ops", *self.arguments])
            self.ran_at, self.stale = time.monotonic(), False

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to draw."""
        return not self.stale and (self.process is None or self.process.poll() is not None)
