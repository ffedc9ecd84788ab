"""A process that prints JSON lines for the agent: bounded, restarted with a pause, and never trusted.

What it reads can end it, hold it up for ever, or write into its output. None of that may reach the agent: a line that
is not as promised is left out and counted, and an old line is no reading any more.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from opt_ops.node.log import log

OK, STARTING, HUNG, CRASHED = "ok", "starting", "hung", "crashed"

MOST_DEATHS = 3
"""So many ends of the process, without `STABLE_SECONDS` of work in between, are `crashed`."""

STABLE_SECONDS = 10.0
"""A process that works for so long after an end has recovered."""

LONGEST_PAUSE = 30.0
"""Seconds before a restart. The first pause is one second, each further one is twice as long."""

LONGEST_LINE = 1 << 20  # bytes
_PR_SET_PDEATHSIG = 1  # prctl(2)
_MOST_BYTES = 4 << 20  # of one call: a process that writes without end must not hold up the agent

Accept = Callable[[Any], dict[str, Any] | None]
"""Turns a parsed line into a bounded value; None: it is not as promised."""


class LineProcess:
    """Runs the process and keeps its newest line. No method blocks for long, and none raises.

    Args:
        command: The process. Its standard output is read.
        deadline: Seconds after which a line is too old, and a process without a line is `hung`.
        accept: What a line must be.
        clock: Monotonic seconds.
    """

    def __init__(
        self, command: Sequence[str], deadline: float, accept: Accept, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._command = command
        self._deadline = deadline
        self._accept = accept
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._skipping = False  # the rest of a line that is too long
        self._newest: dict[str, Any] | None = None
        self._received_at = self._began_at = self._started_at = clock()
        self._deaths = 0
        self._lines_since = 0.0  # the first line of this process
        self._killed = False
        self._next_start = clock()
        self.starts = 0
        self.left_out = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the lines since the last call. Starts the process where it has ended, but not too often."""
        lines = self._new_lines()
        if self._process is not None and self._process.poll() is not None:
            lines += self._new_lines()
            self._ended()
        if self._process is None and self._clock() >= self._next_start:
            self._start()
        elif self._process is not None and self._clock() - max(self._received_at, self._started_at) > self._deadline:
            self._killed = True
            self._process.kill()  # has no effect on a call stuck in the kernel; its end starts the next process
        return lines

    @property
    def state(self) -> str:
        """`ok`, `starting` before the first line, else `hung` or `crashed`: there is no line that still counts."""
        if self._deaths >= MOST_DEATHS:
            return CRASHED
        if self._clock() - self._received_at <= self._deadline:
            return STARTING if self._newest is None else OK
        return CRASHED if self._deaths else HUNG

    @property
    def newest(self) -> dict[str, Any] | None:
        """The newest line; None if there is none that still counts."""
        return self._newest if self.state == OK else None

    @property
    def age(self) -> float | None:
        """Seconds since the newest line came; None before the first one."""
        return None if self._newest is None else self._clock() - self._received_at

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdout is not None:
            self._process.kill()
            self._process.stdout.close()
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it ends when its call returns
                self._process.wait(1.0)
            self._process = None

    def _start(self) -> None:
        self._buffer, self._skipping, self._killed, self._lines_since = b"", False, False, 0.0
        self._started_at = self._clock()
        self.starts += 1
        try:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        except OSError as error:  # no memory or no process number for a moment
            log(f"{self._command[0]} cannot be started: {error}")
            self._died()
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _ended(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        code, self._process = self._process.returncode, None
        if self._killed:  # it was hung, for a whole deadline: the next one may start at once
            self._next_start = self._clock()
            return
        self._died()
        if self._deaths <= MOST_DEATHS:
            what = " ".join(self._command[1:5])
            log(f"`{what}` ended with {code}; the next start is in {self._next_start - self._clock():.0f} s")

    def _died(self) -> None:
        self._deaths += 1
        self._next_start = self._clock() + min(LONGEST_PAUSE, 2.0 ** min(self._deaths - 1, 10))

    def _new_lines(self) -> list[dict[str, Any]]:
        if self._process is None or self._process.stdout is None:
            return []
        found: list[dict[str, Any]] = []
        taken = 0
        with suppress(BlockingIOError):
            while taken < _MOST_BYTES and (chunk := os.read(self._process.stdout.fileno(), 1 << 16)):
                taken += len(chunk)
                found += self._lines_of(chunk)
        if found:
            self._newest, self._received_at = found[-1], self._clock()
            self._lines_since = self._lines_since or self._received_at
            if self._received_at - self._lines_since >= STABLE_SECONDS:
                self._deaths = 0
        return found

    def _lines_of(self, chunk: bytes) -> list[dict[str, Any]]:
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if self._skipping and lines:
            self._skipping = False
            del lines[0]
        if len(self._buffer) > LONGEST_LINE:
            self.left_out += not self._skipping
            self._buffer, self._skipping = b"", True
        elif self._skipping:
            self._buffer = b""
        values = [parsed(line, self._accept) for line in lines]
        self.left_out += values.count(None)
        return [value for value in values if value is not None]


def parsed(line: bytes, accept: Accept) -> dict[str, Any] | None:
    """A line as a value that can be written as JSON again; None if it is not JSON or not as promised."""
    try:
        value = accept(json.loads(line))
        json.dumps(value, allow_nan=False)  # no NaN, no infinity
    except (ValueError, RecursionError):
        return None
    return value


def in_child(call: Callable[[], dict[str, Any]], seconds: float, accept: Accept) -> dict[str, Any] | str:
    """Return what a call returns in a process of its own; `hung` or `crashed` if nothing that is as promised comes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "wb") as file:
                file.write(json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    data, ended, until = b"", False, time.monotonic() + seconds
    while not ended and (left := until - time.monotonic()) > 0 and _readable(reader, left):
        chunk = os.read(reader, 1 << 16)
        ended = not chunk or len(data) > LONGEST_LINE
        data += chunk
    os.close(reader)
    value = parsed(data, accept)
    os.kill(child, signal.SIGKILL)  # has no effect on a call stuck in the kernel, and this process will not wait for it
    os.waitpid(child, os.WNOHANG)
    return value if value is not None else CRASHED if ended else HUNG


def end_with_parent() -> None:
    """Let the kernel end this process with its parent, also while a call hangs."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this request
        sys.exit(1)


def own_stdout() -> Callable[[dict[str, Any]], None]:
    """Return what writes a value as one line to standard output. Nothing else in this process can write there any more.

    Libraries print what they like. Their output goes nowhere, so that it cannot end up in the middle of a line.
    """
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)

    def write(value: dict[str, Any]) -> None:
        file.write(json.dumps(value) + "\n")  # one write: under srun, several nodes share the output
        file.flush()

    return write


def _readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read within that time. `select` refuses descriptors above 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
