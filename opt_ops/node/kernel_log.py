"""Xids and SXids from the kernel log, the only place where the driver reports them with their full text."""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from typing import Any

# `NVRM: Xid (PCI:0000:3b:00): 79, pid=…, GPU has fallen off the bus.`
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+)")
# `nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up`; lines with its data follow.
_SXID = re.compile(r"SXid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+), (?:Non-f|F)atal", re.IGNORECASE)


def parse_xid(line: str) -> tuple[int, str, bool] | None:
    """Parse a kernel-log line with an Xid or SXid: code, PCI address, whether it is of an NVSwitch. Else None."""
    match = _XID.search(line) or _SXID.search(line)
    return (int(match["code"]), match["pci"].lower(), match.re is _SXID) if match else None


class KernelLog:
    """Reads /dev/kmsg. `readable` is False if this user may not read it.

    Args:
        path: The log.
        since: Read lines from this time on, in seconds since the epoch. None: only new lines.
    """

    def __init__(self, path: str = "/dev/kmsg", since: float | None = None) -> None:
        self.readable = False
        self._since = since or 0.0
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if since is None:
                os.lseek(self._descriptor, 0, os.SEEK_END)
            self.readable = True

    def xids(self) -> list[dict[str, Any]]:
        """Return the Xids since the last call, in the form of a heartbeat."""
        parsed = ((parse_xid(line), line, at) for at, line in self._lines() if at >= self._since)
        return [
            {"code": xid[0], "pci": xid[1], "switch": xid[2], "line": line[:300], "at": at, "drill": None}
            for xid, line, at in parsed
            if xid is not None
        ]

    def _lines(self) -> list[tuple[float, str]]:
        """Return the new lines, each with its time."""
        lines: list[tuple[float, str]] = []
        while self.readable:
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EPIPE:  # the ring buffer has overwritten lines: continue with the rest
                    continue
                self.readable = False
                break
            if not record:
                break
            lines.append(_record(record.decode(errors="replace")))
        return lines


def _record(text: str) -> tuple[float, str]:
    """Parse `priority,sequence,microseconds since boot,flags;message`; lines of key=value follow."""
    head, _, message = text.partition(";")
    fields = head.split(",")
    now = time.time()
    ago = time.monotonic() - int(fields[2]) / 1e6 if len(fields) > 2 and fields[2].isdigit() else 0.0
    return min(now, now - ago), message.split("\n", 1)[0]
