"""Reads a heartbeat: one line of `health/<node>.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opt_ops.core.health import EvaluationReport, Gpu, Heartbeat, Machine, Port, Xid
from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest
from opt_ops.core.health.burn_in_plan import GroupMeasurement
from opt_ops.runfolder import fields as f

_GPUS = 1024  # of a node
_NAMES = f.items(f.name, 65_536)


def heartbeat_of(fields: Mapping[str, Any], left_out: list[str] | None = None) -> Heartbeat:
    """Return a line of a health file as a heartbeat. A missing field is unknown, and so is one of another type.

    The reasons for the fields that are left out are added to `left_out`.

    Raises:
        BadField: the line does not say which node reports, and when; or a GPU in it cannot be told: without it the
            node would seem to have lost one.
    """
    record = f.Record(fields, left_out=left_out)
    readings = enumerate(record.nullable("gpus", lambda value: f.values(value, _GPUS), ()))
    gpus = [_reading(f.Record(gpu, f"gpus[{number}].", record.left_out)) for number, gpu in readings]
    counters = [joules for _, joules in gpus]
    return Heartbeat(
        node=record.required("node", f.name),
        host=record.required("host", f.name),
        ts=record.required("ts", f.moment),
        attempt=record.optional("attempt", f.name, None),
        nvml=record.required("nvml", f.name),
        orders=record.optional("orders", _orders, (0, 0)),
        orders_refused=_refusal(record.part("orders_refused")),
        gpus=tuple(gpu for gpu, _ in gpus),
        xids=record.each("xids", lambda xid: xid.build(Xid, at=xid.required("at", f.moment)), 4096),
        allocation=record.optional("allocation", f.name, None),
        warned=record.optional("warned", f.flag, False),
        driver=record.optional("driver", f.name, None),
        machine=_machine(record.part("machine")),
        burning=record.optional("burning", f.flag, False),
        burn_in=_burn_in(record.part("burn_in")),
        burned_at=record.optional("burned_at", f.moment, 0.0),
        peer_lost=record.optional("peer_lost", f.flag, False),
        standby=0 if (standby := record.part("standby")) is None else standby.optional("ready", f.whole(0, 4096), 0),
        evaluation=_evaluation(record.part("evaluation")),
        energy_joules=sum(each for each in counters if each is not None) if counters and None not in counters else None,
    )


def _orders(value: Any) -> tuple[int, int]:
    epoch, seq = f.items(f.whole(0), 2)([*f.values(value, 2), 0, 0][:2])
    return epoch, seq


def _refusal(record: f.Record | None) -> str | None:
    return None if record is None else record.optional("why", f.text(), "no reason given")


def _evaluation(record: f.Record | None) -> EvaluationReport | None:
    if record is None or (name := record.optional("name", f.name, None)) is None:
        return None
    return EvaluationReport(name=name, code=record.optional("code", f.whole(-255, 255), None))


def _reading(record: f.Record) -> tuple[Gpu, float | None]:
    """A GPU, and its energy counter in joules; None if it does not report one."""
    gpu = record.build(Gpu, index=record.required("index", f.whole(0, _GPUS - 1)))
    return gpu, record.optional("energy_joules", f.number(0.0), None)


def _burn_in(record: f.Record | None) -> BurnIn | None:
    """The result of a node's own burn-in; None if it cannot be told what it is."""
    if record is None:
        return None
    try:
        return BurnIn(
            nodes=record.required("nodes", _NAMES),
            devices=record.each("devices", lambda device: device.build(DeviceTest)),
            alone=record.each("alone", _measurement),
            silent=record.optional("silent", _NAMES, ()),
            finished=record.required("finished", f.flag),
        )
    except f.BadField as error:
        record.left_out.append(str(error))
        return None


def _measurement(record: f.Record) -> GroupMeasurement:
    return GroupMeasurement(nodes=record.required("nodes", _NAMES), gbs=record.nullable("gbs", f.number(0.0), None))


def _machine(record: f.Record | None) -> Machine:
    if record is None:
        return Machine()
    carriers, mounts = record.part("carriers"), record.part("mounts")
    return Machine(
        ports=record.each("ports", lambda port: port.build(Port), 1024),
        carriers={} if carriers is None else dict(carriers.all(f.whole(0), 4096)),
        mounts=None if mounts is None else _all_mounts(mounts),
        clock_set=record.optional("clock_set", f.flag, None),
        disk_free=record.optional("disk_free", f.whole(0), None),
        disk_size=record.optional("disk_size", f.whole(0), None),
    )


def _all_mounts(record: f.Record) -> dict[str, bool] | None:
    """All mounts, or None: a file system that is left out would seem to be unmounted."""
    before = len(record.left_out)
    found = dict(record.all(f.flag))
    return found if len(record.left_out) == before else None
