"""What sysfs and the file system say of a host: InfiniBand ports, room for checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/class/infiniband")


def read(folder: Path, sysfs: Path = SYSFS) -> dict[str, Any]:
    """As `machine` of a heartbeat.

    Args:
        folder: One on the file system that checkpoints go to.
        sysfs: Where the InfiniBand adapters are.
    """
    ports = [_port(path) for path in sorted(sysfs.glob("*/ports/*"))]
    try:
        disk = os.statvfs(folder)
    except OSError:
        return {"ports": ports, "disk_free": None, "disk_size": None}
    return {"ports": ports, "disk_free": disk.f_bavail * disk.f_frsize, "disk_size": disk.f_blocks * disk.f_frsize}


def _port(path: Path) -> dict[str, Any]:
    state = _text(path / "state")  # `4: ACTIVE`
    downed = _text(path / "counters" / "link_downed")
    return {
        "name": f"{path.parent.parent.name}/{path.name}",
        "active": None if state is None else state.startswith("4:"),
        "downed": int(downed) if downed and downed.isdigit() else None,
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
