"""Readings of a host from sysfs, /proc and the file system: network ports, mounts, clock, free disk space.

`python -m opt_ops.node host --every 2` prints one JSON line for each reading. It is a process of its own, because a
dead file system can hold up a call for ever, and because a driver that ends the process of NVML must not hide the host.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

from opt_ops.node.line_process import LineProcess, end_with_parent, own_stdout

SYSFS = Path("/sys/class")
MOUNTS = Path("/proc/self/mountinfo")

_NETWORKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs")
_DISKS = ("ext4", "xfs", "btrfs")
_OF_CONTAINERS = ("/var/lib/", "/run/", "/snap/")  # mounts that come and go
_ETHERNET = "1"  # ARPHRD_ETHER
_STATUS_OFFSET, _STA_UNSYNC = 40, 0x40  # of struct timex on 64-bit Linux, and its status bit: adjtimex(2)


def read(folder: Path, sysfs: Path = SYSFS, mounts: Path = MOUNTS) -> dict[str, Any]:
    """Return the readings in the form of `machine` in a heartbeat.

    Args:
        folder: A folder on the file system of checkpoints.
        sysfs: The folder of device classes.
        mounts: The list of mounts. Reading it does not hang on a dead file system.
    """
    readings: dict[str, Any] = {
        "ports": [_port(path) for path in sorted((sysfs / "infiniband").glob("*/ports/*"))],
        "carriers": _carriers(sysfs / "net"),
        "mounts": _mounts(mounts),
        "clock_set": _clock_set(),
    }
    try:
        disk = os.statvfs(folder)
    except OSError:
        return {**readings, "disk_free": None, "disk_size": None}
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    return {**readings, "disk_free": free, "disk_size": size}


def _port(path: Path) -> dict[str, Any]:
    state = _text(path / "state")  # `4: ACTIVE`
    downed = _text(path / "counters" / "link_downed")
    return {
        "name": f"{path.parent.parent.name}/{path.name}",
        "active": None if state is None else state.startswith("4:"),
        "downed": _number(downed),
    }


def _carriers(net: Path) -> dict[str, int]:
    """Carrier losses of each Ethernet adapter that is a device, not a bridge or a tunnel."""
    counts: dict[str, int] = {}
    for path in sorted(net.glob("*")):
        if (path / "device").exists() and _text(path / "type") == _ETHERNET:
            count = _number(_text(path / "carrier_down_count"))
            if count is not None:
                counts[path.name] = count
    return counts


def _mounts(path: Path) -> dict[str, bool] | None:
    """Mount points of disks and network file systems, each with whether it is writable (proc(5), mountinfo).

    Mounts of an automounter are skipped: they are unmounted when nobody uses them.
    """
    text = _text(path)
    if text is None:
        return None
    lines = [[part.split() for part in line.split(" - ", 1)] for line in text.splitlines() if " - " in line]
    parsed = [
        (_unescaped(head[4]), head[5], tail[0], tail[2]) for head, tail in lines if len(head) > 5 and len(tail) > 2
    ]
    automounted = [where for where, _, kind, _ in parsed if kind == "autofs"]
    found: dict[str, bool] = {}
    for where, options, kind, of_all in parsed:
        if kind not in (*_NETWORKS, *_DISKS) or where.startswith(_OF_CONTAINERS):
            continue
        if not any(where == auto or where.startswith(f"{auto}/") for auto in automounted):
            found[where] = "ro" not in (*options.split(","), *of_all.split(","))
    return found


def _unescaped(where: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), where)


def _clock_set() -> bool | None:
    """Whether the kernel's clock is synchronised; None if the kernel does not report it."""
    buffer = ctypes.create_string_buffer(512)  # modes is 0: the call only reads
    try:
        answer = ctypes.CDLL(None).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if answer < 0:
        return None
    (status,) = struct.unpack_from("i", buffer, _STATUS_OFFSET)
    return not status & _STA_UNSYNC


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 19 else None


class HostProbe:
    """What the host says, from its reading process. No method blocks for long."""

    def __init__(self, every: float, deadline: float, folder: Path) -> None:
        command = [sys.executable, "-m", "opt_ops.node", "host", "--every", str(every), "--folder", str(folder)]
        self._process = LineProcess(command, deadline, _machine_of)

    def latest(self) -> dict[str, Any]:
        """Return the newest reading in the form of `machine` in a heartbeat; empty if none still counts."""
        self._process.read()
        return self._process.newest or {}

    def close(self) -> None:
        """End the reading process."""
        self._process.close()


_FIELDS = ("ports", "carriers", "mounts", "clock_set", "disk_free", "disk_size")


def _machine_of(value: Any) -> dict[str, Any] | None:
    return {name: value.get(name) for name in _FIELDS} if isinstance(value, dict) else None


def main() -> None:
    """Print readings at intervals until the other end of the pipe is closed."""
    parser = argparse.ArgumentParser(
        prog="python -m opt_ops.node host", description="Prints readings of the host as JSON lines."
    )
    parser.add_argument("--every", type=float, default=2.0, help="seconds between readings")
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the file system of checkpoints")
    options = parser.parse_args()
    write = own_stdout()
    end_with_parent()
    while True:
        try:
            write(read(options.folder))
        except BrokenPipeError:
            return
        time.sleep(options.every)
