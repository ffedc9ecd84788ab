"""Xid errors from the kernel log. Its lines are the only place where the driver says them to everyone."""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from typing import Any

# `NVRM: Xid (PCI:0000:3b:00): 79, pid=…, GPU has fallen off the bus.`
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+)")


def parse_xid(line: str) -> tuple[int, str] | None:
    """(code, PCI address) of a kernel-log line that reports an Xid."""
    match = _XID.search(line)
    return (int(match["code"]), match["pci"]) if match else None


class KernelLog:
    """Follows /dev/kmsg from now on. Where it may not be read, nothing is seen, and `readable` says so."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self.readable = False
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._descriptor, 0, os.SEEK_END)
            self.readable = True

    def xids(self) -> list[dict[str, Any]]:
        """Those that came since the last call, as heartbeats carry them."""
        parsed = ((parse_xid(line), line) for line in self._lines())
        return [
            {"code": xid[0], "pci": xid[1], "line": line[:300], "at": time.time(), "drill": None}
            for xid, line in parsed
            if xid is not None
        ]

    def _lines(self) -> list[str]:
        lines: list[str] = []
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
            # `priority,sequence,timestamp,flags;message`, then lines of key=value
            lines.append(record.decode(errors="replace").partition(";")[2].split("\n", 1)[0])
        return lines
