"""Reads a heartbeat: one line of `health/<node>.jsonl`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from opt_ops.core.health import Gpu, Heartbeat, Machine, Port, Xid
from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest
from opt_ops.core.health.burn_in_plan import GroupMeasurement

_GPU_FIELDS = frozenset(field.name for field in dataclasses.fields(Gpu))


def heartbeat_of(fields: Mapping[str, Any]) -> Heartbeat:
    """Return a line of a health file as a heartbeat. A missing field is unknown.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the line is not as docs/formats.md says.
    """
    return Heartbeat(
        node=fields["node"],
        host=fields["host"],
        ts=fields["ts"],
        attempt=fields.get("attempt"),
        nvml=fields["nvml"],
        orders=tuple(fields.get("orders", (0, 0))),
        gpus=tuple(_gpu_of(gpu) for gpu in fields.get("gpus", ())),
        xids=tuple(Xid(**xid) for xid in fields.get("xids", ())),
        allocation=fields.get("allocation"),
        warned=bool(fields.get("warned")),
        driver=fields.get("driver"),
        machine=_machine_of(fields.get("machine") or {}),
        burning=bool(fields.get("burning")),
        burn_in=_burn_in_of(fields["burn_in"]) if fields.get("burn_in") else None,
        burned_at=fields.get("burned_at") or 0.0,
        energy_joules=_energy_of(fields.get("gpus", ())),
    )


def _gpu_of(fields: Mapping[str, Any]) -> Gpu:
    return Gpu(**{name: fields[name] for name in fields.keys() & _GPU_FIELDS})


def _energy_of(gpus: Sequence[Mapping[str, Any]]) -> float | None:
    """Sum of the counters of all GPUs; None if a GPU does not report its counter."""
    counters = [gpu.get("energy_joules") for gpu in gpus]
    return sum(counters) if counters and None not in counters else None  # type: ignore[arg-type]


def _burn_in_of(fields: Mapping[str, Any]) -> BurnIn:
    """The result of a node's own burn-in."""
    return BurnIn(
        nodes=tuple(fields["nodes"]),
        devices=tuple(DeviceTest(**device) for device in fields["devices"]),
        alone=tuple(GroupMeasurement(nodes=tuple(each["nodes"]), gbs=each["gbs"]) for each in fields["alone"]),
        silent=tuple(fields["silent"]),
        finished=fields["finished"],
    )


def _machine_of(fields: Mapping[str, Any]) -> Machine:
    ports = tuple(Port(name=p["name"], active=p["active"], downed=p["downed"]) for p in fields.get("ports", ()))
    return Machine(
        ports=ports,
        carriers=fields.get("carriers") or {},
        mounts=fields.get("mounts"),
        clock_set=fields.get("clock_set"),
        disk_free=fields.get("disk_free"),
        disk_size=fields.get("disk_size"),
    )
