"""Errors of GPUs and NVSwitches from the kernel log, the only place where the driver reports them with their text."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from opt_ops.core.health.kernel_lines import log_events

MOST_RECORDS = 20_000
"""Of one call: a storm of messages must not hold up the agent. The next call goes on."""

LINE_LENGTH = 300
"""Characters of a line that a heartbeat keeps."""


def parse_xid(line: str) -> tuple[int, str, bool] | None:
    """Parse a kernel-log line with an Xid or SXid: code, PCI address, whether it is of an NVSwitch. Else None."""
    numbered = [event for event in log_events(line) if event.code is not None]
    return (numbered[0].code or 0, numbered[0].pci, numbered[0].switch) if numbered else None


class KernelLog:
    """Reads /dev/kmsg. `readable` is False if this user may not read it. `gaps` counts how often lines were lost.

    Args:
        path: The log.
        since: Read lines from this time on, in seconds since the epoch. None: only new lines.
    """

    def __init__(self, path: str = "/dev/kmsg", since: float | None = None) -> None:
        self.readable = False
        self.gaps = 0
        self.behind = False
        """Whether the last call left records, because there were too many."""
        self._since = since or 0.0
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if since is None:
                os.lseek(self._descriptor, 0, os.SEEK_END)
            self.readable = True

    def xids(self) -> list[dict[str, Any]]:
        """Return the errors since the last call, in the form of a heartbeat."""
        found: list[dict[str, Any]] = []
        for at, text in self._records():
            if at < self._since:
                continue
            for event in log_events(text):
                said = {"code": event.code or 0, "pci": event.pci, "switch": event.switch, "kind": event.kind}
                found.append({**said, "line": event.line[:LINE_LENGTH], "at": at, "drill": None})
        return found

    def _records(self) -> Iterator[tuple[float, str]]:
        """Yield the new records, each with its time."""
        self.behind = False
        for _ in range(MOST_RECORDS):
            if not self.readable:
                return
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EPIPE:  # the ring buffer has overwritten lines: continue with the rest
                    self.gaps += 1
                    continue
                self.readable = False
                return
            if not record:
                return
            yield _record(record.decode(errors="replace"))
        self.behind = True


def _record(text: str) -> tuple[float, str]:
    """Parse `priority,sequence,microseconds since boot,flags;message`; lines of key=value follow."""
    head, _, message = text.partition(";")
    fields = head.split(",")
    now = time.time()
    since_boot = fields[2] if len(fields) > 2 else ""
    plain = since_boot.isascii() and since_boot.isdecimal() and len(since_boot) < 19
    ago = time.monotonic() - int(since_boot) / 1e6 if plain else 0.0
    return min(now, now - ago), message.split("\n", 1)[0]
