"""What sysfs, /proc and the file system say of a host: network ports, mounts, the clock, room for checkpoints."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/class")
MOUNTS = Path("/proc/self/mountinfo")

_NETWORKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs")
_DISKS = ("ext4", "xfs", "btrfs")
_OF_CONTAINERS = ("/var/lib/", "/run/", "/snap/")  # they come and go
_ETHERNET = "1"  # ARPHRD_ETHER
_STATUS_OFFSET, _STA_UNSYNC = 40, 0x40  # of struct timex on 64-bit Linux, and its status bit: adjtimex(2)


def read(folder: Path, sysfs: Path = SYSFS, mounts: Path = MOUNTS) -> dict[str, Any]:
    """As `machine` of a heartbeat.

    Args:
        folder: One on the file system that checkpoints go to.
        sysfs: Where the classes of devices are.
        mounts: The list of mounts. Reading it never hangs, as looking at a dead file system does.
    """
    said: dict[str, Any] = {
        "ports": [_port(path) for path in sorted((sysfs / "infiniband").glob("*/ports/*"))],
        "carriers": _carriers(sysfs / "net"),
        "mounts": _mounts(mounts),
        "clock_set": _clock_set(),
    }
    try:
        disk = os.statvfs(folder)
    except OSError:
        return {**said, "disk_free": None, "disk_size": None}
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    return {**said, "disk_free": free, "disk_size": size}


def _port(path: Path) -> dict[str, Any]:
    state = _text(path / "state")  # `4: ACTIVE`
    downed = _text(path / "counters" / "link_downed")
    return {
        "name": f"{path.parent.parent.name}/{path.name}",
        "active": None if state is None else state.startswith("4:"),
        "downed": int(downed) if downed and downed.isdigit() else None,
    }


def _carriers(net: Path) -> dict[str, int]:
    """Of each Ethernet adapter that is a device, not a bridge or a tunnel: how often it lost its carrier."""
    counts: dict[str, int] = {}
    for path in sorted(net.glob("*")):
        if (path / "device").exists() and _text(path / "type") == _ETHERNET:
            count = _text(path / "carrier_down_count")
            if count is not None and count.isdigit():
                counts[path.name] = int(count)
    return counts


def _mounts(path: Path) -> dict[str, bool] | None:
    """Disks and network file systems by where they are mounted, with whether they can be written (proc(5), mountinfo).

    What an automounter mounts is left out: it is unmounted when nobody uses it.
    """
    text = _text(path)
    if text is None:
        return None
    lines = [line.split(" - ", 1) for line in text.splitlines() if " - " in line]
    parsed = [(_unescaped(head.split()[4]), head.split()[5], *tail.split()[:3:2]) for head, tail in lines]
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
    """Whether the kernel's clock is kept right; None where it does not say."""
    buffer = ctypes.create_string_buffer(512)  # with modes 0 it only reads
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
        return path.read_text().strip()
    except OSError:
        return None
