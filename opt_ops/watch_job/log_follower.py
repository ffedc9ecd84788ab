"""Follows a log file that another program writes: it grows, is truncated, is rotated, or is not there yet.

Lines end at line feeds and at carriage returns. A line longer than 64 KiB is cut, and its rest is left out, so memory
is bounded for any file. The file is only read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opt_ops.runfolder.files import open_regular

LONGEST_LINE = 64 * 1024  # bytes
_PIECE = 1024 * 1024  # bytes that are read at once
_AT_ONCE = 64 * _PIECE  # bytes of one look: between two looks, the job is asked for
_IDENTITY = 256  # bytes at the start of a file that tell whether it was written anew


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the log between two line ends. `starts_line`: it stands behind a line feed, not a carriage return."""

    text: str
    starts_line: bool


class LineSplitter:
    """Splits bytes into segments. An unfinished one waits for its end."""

    def __init__(self) -> None:
        self._rest = b""
        self._starts_line = True

    def feed(self, data: bytes) -> Iterator[Segment]:
        """Yield the segments that end in these bytes. Those without any byte are left out."""
        for line in (self._rest + data).splitlines(keepends=True):
            body = line.rstrip(b"\r\n")
            if len(body) == len(line):
                self._rest = body[:LONGEST_LINE]
                return
            if body:
                yield Segment(body[:LONGEST_LINE].decode(errors="replace"), self._starts_line)
                self._starts_line = False
            if line.endswith(b"\n"):
                self._starts_line = True
        self._rest = b""

    def finish(self) -> Iterator[Segment]:
        """Yield the unfinished segment as it is: the log has ended, or another file begins."""
        rest, self._rest = self._rest, b""
        if rest:
            yield Segment(rest.decode(errors="replace"), self._starts_line)
        self._starts_line = True


class LogFollower:
    """Follows one file. Each call reads what is new, at most 64 MiB; `behind` says whether more is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.behind = False
        self.size = 0
        """Bytes that were read of all files of this name."""
        self.changed_at: float | None = None
        """When the file was last written, by the clock of its server; None: there is none."""
        self._lines = LineSplitter()
        self._descriptor = -1
        self._offset = 0
        self._head = b""

    @property
    def exists(self) -> bool:
        """Whether the file was there at the last look, or an earlier one of this name is still open."""
        return self._descriptor >= 0

    def read(self) -> Iterator[Segment]:
        """Yield the new segments.

        Raises:
            OSError: the file is there and cannot be read.
        """
        self.behind = False
        try:
            newest = open_regular(self.path)  # opened anew: network file systems check for changes then
        except FileNotFoundError:
            yield from self._read_on()  # it was moved away: its writer may still write to it
            return
        if self._descriptor < 0 or os.path.sameopenfile(newest, self._descriptor):
            self._take(newest)
        else:
            yield from self._rest_of_rotated(newest)
        if self._was_written_anew():
            yield from self._lines.finish()
            self._offset, self._head = 0, b""
        yield from self._read_on()

    def _rest_of_rotated(self, newest: int) -> Iterator[Segment]:
        """What the file before had still to tell; then the new one is taken."""
        try:
            yield from self._read_on()
            while self.behind:
                yield from self._read_on()
            yield from self._lines.finish()
        finally:
            self._take(newest)
            self._offset, self._head = 0, b""

    def _take(self, descriptor: int) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def _was_written_anew(self) -> bool:
        """Whether the file is shorter than what was read of it, or begins with other bytes."""
        if os.fstat(self._descriptor).st_size < self._offset:
            return True
        return bool(self._head) and os.pread(self._descriptor, len(self._head), 0) != self._head

    def _read_on(self) -> Iterator[Segment]:
        if self._descriptor < 0:
            return
        found = os.fstat(self._descriptor)
        self.changed_at = found.st_mtime
        end = min(found.st_size, self._offset + _AT_ONCE)
        self.behind = end < found.st_size
        while self._offset < end:
            data = os.pread(self._descriptor, min(_PIECE, end - self._offset), self._offset)
            if not data:
                break
            if len(self._head) < _IDENTITY and self._offset == len(self._head):
                self._head += data[: _IDENTITY - len(self._head)]
            self._offset += len(data)
            self.size += len(data)
            yield from self._lines.feed(data)

    def finish(self) -> Iterator[Segment]:
        """Yield a last line without its end: nobody writes to the log any more."""
        yield from self._lines.finish()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
