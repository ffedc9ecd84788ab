"""What only several nodes beside each other show: one that is not like the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from opt_ops.core.health.burn_in_findings import compared
from opt_ops.core.health.readings import Heartbeat
from opt_ops.core.health.table import Judgement, Row, Verb, judgement
from opt_ops.core.values import Verdict

LEAST_NODES = 3
"""With fewer, nobody can say who is the odd one."""


SKEW_SECONDS = 60.0
"""More than a shared file system delays what it shows."""


def _row(what: str, signal: str, source: str = "") -> Row:
    return Row(
        reason=f"{what}_differs",
        signal=signal,
        verdict=Verdict.HEALTHY,
        verb=Verb.NONE,
        source=source or "gcm: equal across the fleet. Reported only: a fleet may be upgraded node by node",
    )


MISSING = Row(
    reason="gpu_missing",
    signal="fewer GPUs than most held nodes, where no number is configured",
    verdict=Verdict.SUSPECT,
    verb=Verb.REBOOT_NODE,
    source="opt-ops: nodes of a site are alike; with `health.gpus_per_node` it is bad",
)

FLEET_ROWS = (
    _row("driver", "the driver version differs from most held nodes"),
    _row("vbios", "a GPU's VBIOS differs from most GPUs of its name"),
    _row("inforom", "a GPU's InfoROM differs from most GPUs of its name"),
    _row("clock", "a GPU's highest clock differs from most GPUs of its name"),
    _row(
        "time",
        f"the heartbeats' time differs by more than {SKEW_SECONDS:g} s from the median of all nodes",
        "opt-ops. Reported only: opt-ops measures times with its own clock",
    ),
)


def differing(heartbeats: Sequence[Heartbeat], expected_gpus: int = 0) -> Mapping[str, Judgement]:
    """The nodes that differ from most others, each with its first difference.

    Args:
        heartbeats: The newest of each node, all just come. What a node does not say makes it neither equal nor
            different.
        expected_gpus: How many GPUs the site says that a node has. 0: it does not say, and most nodes decide.
    """
    driver, vbios, inforom, clock, time = FLEET_ROWS
    # A node's GPUs are alike, nearly always.
    kinds = {(b.node, g.name or "", g.vbios, g.inforom, g.clock_most) for b in heartbeats for g in b.gpus}
    said = (
        (driver, {(beat.node, "", beat.driver) for beat in heartbeats}),
        (vbios, {(node, name, value) for node, name, value, _, _ in kinds}),
        (inforom, {(node, name, value) for node, name, _, value, _ in kinds}),
        (clock, {(node, name, None if value is None else str(value)) for node, name, _, _, value in kinds}),
    )
    found: dict[str, Judgement] = {}
    counts = {(beat.node, "", str(len(beat.gpus))) for beat in heartbeats if beat.nvml == "ok"}
    for node, has, most in _odd(counts) if expected_gpus == 0 else ():
        if int(has) < int(most):
            found[node] = judgement(MISSING, {"expected": int(most), "found": int(has)})
    for row, values in said:
        for node, value, most in _odd(values):
            found.setdefault(node, judgement(row, {"value": value, "most": most}))
    for node, judged in compared([beat.burn_in for beat in heartbeats if beat.burn_in is not None]):
        found.setdefault(node, judged)
    if len(heartbeats) >= LEAST_NODES:
        middle = median(beat.ts for beat in heartbeats)
        for beat in heartbeats:
            if abs(beat.ts - middle) > SKEW_SECONDS:
                found.setdefault(beat.node, judgement(time, {"seconds": beat.ts - middle}))
    return found


def _odd(said: Iterable[tuple[str, str, str | None]]) -> Iterator[tuple[str, str, str]]:
    """(node, its value, what more than half of the nodes say) of those of one kind that say something else."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for node, kind, value in said:
        if value is not None:
            by_kind.setdefault(kind, []).append((node, value))
    for pairs in by_kind.values():
        most, count = Counter(value for _, value in pairs).most_common(1)[0]
        if len({node for node, _ in pairs}) >= LEAST_NODES and 2 * count > len(pairs):
            yield from ((node, value, most) for node, value in sorted(pairs) if value != most)
