"""Every row about readings, held against every part of a node."""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.core.health.conditions import (
    CARRIERS,
    MINUTE,
    GpuRow,
    NodeReading,
    NodeRow,
    PortRow,
    carrier_flaps,
    carriers_lost,
    clock_unset,
    disk_low,
    lost_mounts,
    missing,
    port_down,
    port_flaps,
    read_only_mounts,
)
from opt_ops.core.health.readings import Gpu, Port
from opt_ops.core.health.rows import GPU_ROWS
from opt_ops.core.health.table import Row, Scope, Verb
from opt_ops.core.values import Verdict

Part = Gpu | Port | None
"""None: the node as a whole."""

PORT_ROWS = (
    PortRow(
        reason="port_flaps",
        slows=True,
        signal="an InfiniBand port went down three times in this allocation",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        source="gpud: three flaps, until an operator clears it",
        disagree="NVRx: any increase within 60 s; Azure: 5 carrier losses in 24 h",
        applies=port_flaps,
    ),
    PortRow(
        reason="port_down",
        slows=True,
        signal="an InfiniBand port that was up in this allocation has been down for four minutes",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        readings=4 * MINUTE,
        source="gpud: down ≥ 4 minutes",
        disagree="Imbue: every port ACTIVE, at once",
        applies=port_down,
    ),
)


NODE_ROWS = (
    NodeRow(
        reason="gpu_missing",
        signal="fewer GPUs than `health.gpus_per_node` (or Slurm's), or than at the start of this allocation",
        verdict=Verdict.BAD,
        verb=Verb.REBOOT_NODE,
        again=Verb.ISOLATE,
        source="gcm: GPU count as configured",
        applies=missing,
        shows=lambda sight: {"expected": sight.expected_gpus, "found": len(sight.now.gpus)},
    ),
    NodeRow(
        reason="mount_lost",
        signal="a file system that was writable in this allocation is no longer mounted",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        readings=5,
        source="LBNL's node health check: file systems mounted as configured",
        disagree="here compared with earlier readings; an automounter may unmount its mounts",
        applies=lambda sight: None if sight.now.machine.mounts is None else bool(lost_mounts(sight)),
        shows=lambda sight: {"lost": lost_mounts(sight)},
    ),
    NodeRow(
        reason="mount_read_only",
        signal="a file system that was writable in this allocation is now read-only",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        readings=5,
        source="LBNL's node health check: mounted for writing; the kernel makes a failing disk read-only",
        applies=lambda sight: None if sight.now.machine.mounts is None else bool(read_only_mounts(sight)),
        shows=lambda sight: {"read_only": read_only_mounts(sight)},
    ),
    NodeRow(
        reason="carrier_lost",
        signal=f"an Ethernet adapter lost its carrier {CARRIERS} times within 24 hours",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        source=f"Azure: {CARRIERS} losses in 24 h",
        disagree="gcm: Ethernet only warns",
        applies=carrier_flaps,
        shows=lambda sight: {"lost": carriers_lost(sight)},
    ),
    NodeRow(
        reason="clock_unset",
        signal="the host's clock is not synchronized, as the kernel reports",
        verdict=Verdict.HEALTHY,
        verb=Verb.NONE,
        source="adjtimex(2), STA_UNSYNC. Reported only: opt-ops measures times with its own clock",
        applies=clock_unset,
        shows=lambda sight: {"clock_set": sight.now.machine.clock_set},
    ),
    NodeRow(
        reason="disk_low",
        signal="less than 2 % free on the run folder's file system",
        verdict=Verdict.HEALTHY,
        verb=Verb.NONE,
        source="opt-ops. Reported only: a full shared disk is not the node's fault",
        applies=disk_low,
        shows=lambda sight: {"disk_free": sight.now.machine.disk_free, "disk_size": sight.now.machine.disk_size},
    ),
)

SLOWING = frozenset(row.reason for row in (*GPU_ROWS, *PORT_ROWS, *NODE_ROWS) if row.slows)
"""Reasons of a node's verdict for which every rank waits."""


def findings(sight: NodeReading) -> Iterator[tuple[Row, Part, bool | None]]:
    """Every row with every part that it is about, and whether it applies."""
    now = sight.now
    scope = Scope.IDLE if now.idle else Scope.RUNNING
    for row in NODE_ROWS:
        yield row, None, row.applies(sight)
    for row in GPU_ROWS:
        fits = row.scope in (Scope.ANY, scope)
        for gpu in now.gpus:
            yield row, gpu, row.applies(gpu, sight) if fits else False
    for row in PORT_ROWS:
        for port in now.machine.ports:
            yield row, port, row.applies(port, sight)


IDENTITY = ("index", "uuid", "serial")
"""Of a GPU: what every finding about it says first."""


def name_of(part: Part) -> str:
    """What a part is remembered by."""
    if isinstance(part, Gpu):
        return part.uuid or f"gpu {part.index}"
    return "" if part is None else part.name


def evidence_of(row: Row, part: Part, sight: NodeReading) -> dict[str, object]:
    """What is journaled of a row that applies."""
    if isinstance(part, Port):
        return {"port": part.name, "active": part.active, "downed": part.downed}
    if isinstance(row, GpuRow):
        names = (*IDENTITY, *row.shows)
        return {name: value for name in names if (value := getattr(part, name)) is not None}
    return dict(row.shows(sight)) if isinstance(row, NodeRow) else {}
