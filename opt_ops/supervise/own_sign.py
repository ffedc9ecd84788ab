"""The daemon's own liveness file: what it watches, what it cannot watch, and what fails."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_ops import __version__
from opt_ops.core.waiting import still_waiting
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.liveness import FILE, OLD_SECONDS, read_sign

_SECONDS = 2.0  # between two writes

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Watching:
    """What a daemon tells of its watch."""

    lineages: Iterable[str]
    fenced: Iterable[str] = ()
    unwatched: Mapping[str, str] = field(default_factory=dict[str, str])
    paged: Mapping[str, float] = field(default_factory=dict[str, float])
    problems: Iterable[Mapping[str, Any]] = ()

    def fields(self) -> dict[str, Any]:
        """As docs/formats.md says."""
        return {
            "lineages": sorted(self.lineages),
            "fenced": sorted(self.fenced),
            "unwatched": dict(sorted(self.unwatched.items())),
            "paged": dict(sorted(self.paged.items())),
            "problems": list(self.problems),
        }


class OwnSign:
    """Writes the liveness file every two seconds, and at once when the daemon's watch has changed.

    It is `daemon.json`, unless that belongs to a living daemon of another host: then two daemons run, and each has its
    own file, so that neither hides the other.
    """

    def __init__(self, runs: Path, policy: str) -> None:
        self._runs = runs
        self._head = {"v": 1, "host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self._head["policy"] = policy
        self._second = runs / f"daemon-{self._head['host']}-{os.getpid()}.json"
        self._wrote_at = -_SECONDS
        self._fields: dict[str, Any] = {}
        self.why = ""
        """Why the file could not be written at the last try; empty if it was."""

    def write(self, watching: Watching, left: bool = False) -> float | None:
        """Write the file if it is time. `left`: the daemon leaves. Returns the time in it; None: it was not written."""
        fields, now = watching.fields(), time.time()
        if fields == self._fields and not left and time.monotonic() - self._wrote_at < _SECONDS:
            return None
        self._wrote_at, self._fields = time.monotonic(), fields
        sign = {**self._head, "ts": now, **fields}
        try:
            write_json(self._place(now), sign | ({"left_at": now} if left else {}))
        except OSError as error:  # a full disk must not end the watch over lineages whose disk has room
            if str(error) != self.why:
                log.error("the liveness file cannot be written: %s", error)
            self.why = str(error)
            return None
        self.why = ""
        return now

    def _place(self, now: float) -> Path:
        first = read_sign(self._runs / FILE)
        foreign = first is not None and first.host != self._head["host"] and first.left_at is None
        if first is not None and foreign and still_waiting(now, first.ts, OLD_SECONDS):
            return self._second
        self._second.unlink(missing_ok=True)
        return self._runs / FILE
