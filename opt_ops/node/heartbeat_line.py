"""A heartbeat as a line of the health file, of bounded length."""

from __future__ import annotations

import json
from typing import Any

LARGEST_HEARTBEAT = 256 * 1024
"""Bytes of a line. A node with 16 GPUs and 64 Xids needs about 60 KiB; hundreds of mounts need more."""

# What goes first. The empty value means: the host does not say.
_LEAVES: tuple[tuple[str, Any], ...] = (("mounts", None), ("carriers", {}), ("ports", []))


def line_of(heartbeat: dict[str, Any]) -> bytes:
    """Return the heartbeat as one line. If it is too long, parts are left out, and `left_out` names them."""
    line, left_out = _encoded(heartbeat), []
    machine = dict(heartbeat.get("machine") or {})
    for name, nothing in _LEAVES:
        if len(line) <= LARGEST_HEARTBEAT:
            return line
        machine[name] = nothing
        left_out.append(f"machine.{name}")
        line = _encoded({**heartbeat, "machine": machine, "left_out": left_out})
    for name, nothing in (("burn_in", None), ("xids", heartbeat.get("xids", [])[:8]), ("gpus", [])):
        if len(line) <= LARGEST_HEARTBEAT:
            return line
        heartbeat = {**heartbeat, name: nothing}
        if name == "gpus":
            heartbeat["nvml"] = "too_long"  # without its GPUs a reading is none
        left_out.append(name)
        line = _encoded({**heartbeat, "machine": machine, "left_out": left_out})
    return line


def _encoded(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()
