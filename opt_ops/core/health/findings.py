"""Every row about readings, held against every part of a node."""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.core.health.conditions import (
    MINUTE,
    GpuRow,
    NodeRow,
    PortRow,
    Sight,
    disk_low,
    missing,
    port_down,
    port_flaps,
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
        signal="an InfiniBand port went down three times since the allocation began",
        verdict=Verdict.SUSPECT,
        verb=Verb.ISOLATE,
        source="gpud: three flaps, until somebody clears it",
        disagree="NVRx: any increase within 60 s; Azure: 5 carrier losses in 24 h",
        applies=port_flaps,
    ),
    PortRow(
        reason="port_down",
        signal="an InfiniBand port that was up in this allocation is down for four minutes",
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
        signal="fewer GPUs than `health.gpus_per_node`, or a UUID less than at first in this allocation",
        verdict=Verdict.BAD,
        verb=Verb.REBOOT_NODE,
        again=Verb.ISOLATE,
        source="gcm: GPU count as configured",
        applies=missing,
    ),
    NodeRow(
        reason="disk_low",
        signal="less than 2 % free where the run folder is",
        verdict=Verdict.HEALTHY,
        verb=Verb.NONE,
        source="ours. Said, and nothing follows: a full shared disk is no node's fault",
        applies=disk_low,
    ),
)


def findings(sight: Sight) -> Iterator[tuple[Row, Part, bool | None]]:
    """Every row with every part that it is about, and whether it applies."""
    now = sight.now
    scope = Scope.IDLE if now.attempt is None else Scope.RUNNING
    for row in NODE_ROWS:
        yield row, None, row.applies(sight)
    for row in GPU_ROWS:
        if row.scope in (Scope.ANY, scope):
            yield from ((row, gpu, row.applies(gpu, sight)) for gpu in now.gpus)
        else:
            yield from ((row, gpu, False) for gpu in now.gpus)
    for row in PORT_ROWS:
        yield from ((row, port, row.applies(port, sight)) for port in now.machine.ports)


def name_of(part: Part) -> str:
    """What a part is remembered by."""
    if isinstance(part, Gpu):
        return part.uuid or f"gpu {part.index}"
    return "" if part is None else part.name


def evidence_of(row: Row, part: Part, sight: Sight) -> dict[str, object]:
    """What is journaled of a row that applies."""
    if isinstance(part, Port):
        return {"port": part.name, "active": part.active, "downed": part.downed}
    if isinstance(row, GpuRow):
        names = ("index", "uuid", "serial", *row.shows)
        return {name: value for name in names if (value := getattr(part, name)) is not None}
    machine = sight.now.machine
    counts: dict[str, object] = {"expected": sight.expected_gpus, "found": len(sight.now.gpus)}
    return counts if machine.disk_free is None else {**counts, "disk_free": machine.disk_free}
