"""Follows the log of a rank while the rank writes it, and keeps the lines that name a cause.

When torch aborts a rank, megabytes of stacks may come after the reason. So the reason is kept when it is written. The
work of one look and the memory are bounded, however fast a rank writes.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from opt_ops.core.failures.cause_lines import CauseLine, CauseLines

CHUNK = 64 * 1024  # bytes that are read at once
LOOK_SECONDS = 0.05  # for one look at all logs: the agent looks twice a second, and does other work
MOST_BEHIND = 4 * 1024 * 1024  # bytes: what a rank writes faster than it can be looked at is skipped
TAIL_BYTES, TAIL_LINES = 4096, 20  # for people


class RankLog:
    """The log of one process of a rank. What another one wrote into the file before is not looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = CauseLines()
        self._file, self._offset = _end_of(path)
        self._begin = self._offset

    def look(self, until: float) -> None:
        """Look at what is new. It stops when `time.monotonic()` has passed `until`, after one chunk at the earliest."""
        descriptor = self._open()
        if descriptor is None:
            return
        try:
            while data := os.pread(descriptor, CHUNK, self._offset):
                self._offset += len(data)
                self._lines.feed(data, time.time())
                if time.monotonic() > until:
                    return
        except OSError:  # a network file system, for a moment: the next look begins where this one ended
            return
        finally:
            os.close(descriptor)

    def end(self) -> list[CauseLine]:
        """Look at the rest: the rank has ended. Returns the lines that name a cause, in the log's order."""
        self.look(time.monotonic() + 10 * LOOK_SECONDS * MOST_BEHIND / CHUNK)
        return [found.line for found in self._lines.finish(time.time()).found]

    def tail(self) -> str:
        """The last lines, for people. They may show why the rank died."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe, nothing is waited for
        except OSError:
            return ""
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                return ""
            try:
                begin = self._begin if (about.st_dev, about.st_ino) == self._file else 0
                at = max(min(begin, about.st_size), about.st_size - TAIL_BYTES)
                text = os.pread(file.fileno(), TAIL_BYTES, at).decode(errors="replace")
            except OSError:
                return ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def _open(self) -> int | None:
        """A descriptor, if there is something new. A log that was replaced or became shorter is read from its start."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        about = os.fstat(descriptor)
        if (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset:
            self._file, self._offset, self._begin = (about.st_dev, about.st_ino), 0, 0
        self._offset = max(self._offset, about.st_size - MOST_BEHIND)
        if stat.S_ISREG(about.st_mode) and about.st_size > self._offset:
            return descriptor
        os.close(descriptor)
        return None


def _end_of(path: Path) -> tuple[tuple[int, int], int]:
    """Which file it is, and how long; ((0, 0), 0) if there is none yet."""
    try:
        about = path.stat()
    except OSError:
        return (0, 0), 0
    return (about.st_dev, about.st_ino), about.st_size if stat.S_ISREG(about.st_mode) else 0
