"""A line of the reading process, as far as it is what docs/formats.md promises."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from opt_ops.core.health.readings import Gpu

MOST_GPUS = 64
"""Of a node. A driver that counts more is broken."""

LONGEST_TEXT = 300
"""Characters of a text from the driver; NVML's own buffers are shorter."""

_GPU_FIELDS = frozenset({field.name for field in fields(Gpu)} | {"energy_joules"})


def reading_of(value: Any) -> dict[str, Any] | None:
    """A line of the reading process with known fields and bounded values only; None if it is no reading."""
    if not isinstance(value, dict) or not _short(value.get("nvml")) or not isinstance(value.get("gpus"), list):
        return None
    gpus = [gpu for each in value["gpus"][:MOST_GPUS] if (gpu := _gpu_of(each)) is not None]
    events = value.get("xid_events")
    return {
        "nvml": value["nvml"],
        "driver": value["driver"] if _short(value.get("driver")) else None,
        "gpus": gpus,
        "xid_events": [event for each in events if (event := _event_of(each))] if isinstance(events, list) else [],
    }


def _gpu_of(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not _whole(value.get("index")):
        return None
    return {name: item if _plain(item) else None for name, item in value.items() if name in _GPU_FIELDS}


def _event_of(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not _whole(value.get("code")) or not _short(value.get("pci")):
        return None
    at, line = value.get("at"), value.get("line")
    if not isinstance(at, int | float) or not _short(line):
        return None
    return {"code": value["code"], "pci": value["pci"], "line": line, "at": at}


def _short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _plain(value: Any) -> bool:
    return value is None or _short(value) or (isinstance(value, int | float) and abs(value) < 1 << 63)
