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
            {"code": xid[0], "pci": xid[1], "switch": xid[2], "line": line[:300], "at": time.time(), "drill": None}
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
