"""Xids and SXids from the kernel log: the only place where the driver says them with all their text."""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from typing import Any

# `NVRM: Xid (PCI:0000:3b:00): 79, pid=…, GPU has fallen off the bus.`
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+)")
# `nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up`; lines with data of it follow.
_SXID = re.compile(r"SXid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+), (?:Non-f|F)atal", re.IGNORECASE)


def parse_xid(line: str) -> tuple[int, str, bool] | None:
    """Code, PCI address, and whether it is an NVSwitch's, of a kernel-log line that reports an Xid or SXid."""
    match = _XID.search(line) or _SXID.search(line)
    return (int(match["code"]), match["pci"].lower(), match.re is _SXID) if match else None


class KernelLog:
    """Reads /dev/kmsg. Where it may not be read, nothing is seen, and `readable` says so.

    Args:
        path: The log.
        since: Seconds since the epoch from which on lines count. None: those that come from now on.
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
        """Those that came since the last call, as heartbeats carry them."""
        parsed = ((parse_xid(line), line, at) for at, line in self._lines() if at >= self._since)
        return [
            {"code": xid[0], "pci": xid[1], "switch": xid[2], "line": line[:300], "at": at, "drill": None}
            for xid, line, at in parsed
            if xid is not None
        ]

    def _lines(self) -> list[tuple[float, str]]:
        """When each was written, and what it says."""
        lines: list[tuple[float, str]] = []
        while self.readable:
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EPIPE:  # the ring buffer overtook us: go on with what is left
                    continue
                self.readable = False
                break
            if not record:
                break
            lines.append(_record(record.decode(errors="replace")))
        return lines


def _record(text: str) -> tuple[float, str]:
    """`priority,sequence,microseconds since boot,flags;message`, then lines of key=value."""
    head, _, message = text.partition(";")
    fields = head.split(",")
    now = time.time()
    ago = time.monotonic() - int(fields[2]) / 1e6 if len(fields) > 2 and fields[2].isdigit() else 0.0
    return min(now, now - ago), message.split("\n", 1)[0]
