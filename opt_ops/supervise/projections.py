"""Projections of the journal that separate processes draw: the logbook and MLflow."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass
class Projection:
    """A command that draws a lineage's journal. It runs beside the daemon, one process at a time."""

    arguments: tuple[str, ...]
    every: float
    process: subprocess.Popen[bytes] | None = None
    ran_at: float = field(default_factory=time.monotonic)
    stale: bool = True

    def step(self, now: bool) -> None:
        """Start the command if the projection is stale and none runs. With `now`, do not wait for the interval."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None and self.process.returncode != 0:
            log.warning("opt-ops %s ended with code %s", " ".join(self.arguments), self.process.returncode)
            self.stale = not now  # tried again only while the lineage is supervised
        self.process = None
        if self.stale and (now or time.monotonic() - self.ran_at >= self.every):
            self.process = subprocess.Popen([sys.executable, "-m", "opt_ops", *self.arguments])
            self.ran_at, self.stale = time.monotonic(), False

    @property
    def idle(self) -> bool:
        """Whether nothing is left to draw."""
        return not self.stale and (self.process is None or self.process.poll() is not None)
