"""Readings of a node → its verdict, with the reason code and the source of the rule.

One table; the worst row that applies wins. `BAD` ends an attempt that uses the node; `SUSPECT` lets it run and
starts no new one there; what cannot be read is `UNKNOWN`. The Xid actions are those of NVIDIA's catalogue
("immediate resolution" column, docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, as of 2025-10-29). The
driver's own recovery action (NVML field, driver ≥ 570) outranks every single Xid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opt_ops.core.values import Verdict


class Verb(StrEnum):
    """What NVIDIA's catalogue asks for after an Xid."""

    IGNORE = "IGNORE"
    RESTART_APP = "RESTART_APP"
    RESET_GPU = "RESET_GPU"
    REBOOT_NODE = "REBOOT_NODE"
    ISOLATE = "ISOLATE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What NVML said of one GPU. None: the driver does not say."""

    index: int
    uuid: str | None = None
    serial: str | None = None
    name: str | None = None
    error: str | None = None  # the GPU as a whole cannot be read: gpu_is_lost, …
    ecc_uncorrected: int | None = None  # volatile: since the driver was loaded
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery_action: str | None = None
    temperature: int | None = None
    power_watts: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An Xid error from the kernel log, seen since the agent started."""

    code: int
    pci: str
    line: str
    at: float
    drill: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One line of a node's health file."""

    node: str
    host: str
    ts: float
    attempt: str | None
    nvml: str  # ok, absent, hung, or NVML's error name
    orders: tuple[int, int] = (0, 0)  # epoch and sequence number of the orders it last acted on
    gpus: tuple[Gpu, ...] = ()
    xids: tuple[Xid, ...] = ()
    allocation: str | None = None  # through which the agent holds the node
    warned: bool = False  # the scheduler has said that it will end soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with its reason code and who says so."""

    verdict: Verdict
    reason: str
    source: str
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    drill: str | None = None


_CATALOGUE = "NVIDIA Xid catalogue"

_XIDS_BY_VERB: Mapping[Verb, tuple[int, ...]] = {
    Verb.RESTART_APP: (
        *(8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80, 82, 83, 84, 85, 86, 88, 89, 94),
        *range(96, 106),
        *range(126, 136),
        139,
    ),
    Verb.IGNORE: (37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 157, 160, 161),
    Verb.RESET_GPU: (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    Verb.REBOOT_NODE: (79, 151),
    # 48 (double-bit error) alone asks for a field diagnostic; 54 is a power cable, 142 ends with support.
    Verb.ISOLATE: (48, 54, 142),
}

XID_VERBS: Mapping[int, Verb] = {code: verb for verb, codes in _XIDS_BY_VERB.items() for code in codes}

_VERDICT_OF_VERB: Mapping[Verb, Verdict] = {
    Verb.RESET_GPU: Verdict.BAD,
    Verb.REBOOT_NODE: Verdict.BAD,
    Verb.ISOLATE: Verdict.BAD,
}


def judge(heartbeat: Heartbeat, expected_gpus: int) -> Judgement:
    """The node's verdict by its newest heartbeat.

    Args:
        heartbeat: The newest one.
        expected_gpus: How many GPUs the site says that a node has; 0 where it has none.
    """
    return min(_judgements(heartbeat, expected_gpus), key=lambda judgement: _RANK[judgement.verdict])


_RANK = {Verdict.BAD: 0, Verdict.SUSPECT: 1, Verdict.UNKNOWN: 2, Verdict.HEALTHY: 3}


def _judgements(heartbeat: Heartbeat, expected_gpus: int) -> Iterator[Judgement]:
    if heartbeat.nvml != "ok":
        yield Judgement(
            verdict=Verdict.UNKNOWN,
            reason=f"nvml_{heartbeat.nvml}",
            source="a GPU that cannot be read is neither healthy nor bad",
        )
    elif len(heartbeat.gpus) < expected_gpus:
        yield Judgement(
            verdict=Verdict.BAD,
            reason="gpu_missing",
            source="gcm: GPU count as configured",
            evidence={"expected": expected_gpus, "found": len(heartbeat.gpus)},
        )
    for gpu in heartbeat.gpus:
        yield from (Judgement(**_of_gpu(gpu, row)) for row in GPU_RULES if row.applies(gpu))
    for xid in heartbeat.xids:
        yield _of_xid(xid)
    if heartbeat.nvml == "ok":
        yield Judgement(verdict=Verdict.HEALTHY, reason="ok", source="no rule of the table applies")


@dataclass(frozen=True, slots=True)
class GpuRule:
    """A row of the table: when it applies, and what follows."""

    reason: str
    verdict: Verdict
    source: str
    applies: Callable[[Gpu], bool]


GPU_RULES = (
    GpuRule("gpu_lost", Verdict.BAD, "NVML_ERROR_GPU_IS_LOST; as Xid 79", lambda gpu: gpu.error == "gpu_is_lost"),
    GpuRule(
        "reset_required",
        Verdict.BAD,
        "NVML_ERROR_RESET_REQUIRED: the driver refuses work until the GPU is reset",
        lambda gpu: gpu.error == "reset_required",
    ),
    GpuRule(
        "gpu_unreadable",
        Verdict.UNKNOWN,
        "a GPU that cannot be read is neither healthy nor bad",
        lambda gpu: gpu.error not in (None, "gpu_is_lost", "reset_required"),
    ),
    GpuRule(
        "recovery_action",
        Verdict.BAD,
        "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, the driver's own wish; outranks single Xids",
        lambda gpu: gpu.recovery_action not in (None, "none"),
    ),
    GpuRule(
        "ecc_uncorrected",
        Verdict.BAD,
        "gcm and Imbue: uncorrected volatile > 0; DCGM: VOLATILE_DBE isolates",
        lambda gpu: bool(gpu.ecc_uncorrected),
    ),
    GpuRule(
        "remap_failed",
        Verdict.BAD,
        "NVIDIA: row remap failure, field diagnostic, then RMA",
        lambda gpu: bool(gpu.remap_failed),
    ),
    GpuRule(
        "remap_pending",
        Verdict.SUSPECT,
        "NVIDIA Xid 63: takes effect at the next reset; the running job may go on",
        lambda gpu: bool(gpu.remap_pending),
    ),
)


def _of_gpu(gpu: Gpu, rule: GpuRule) -> dict[str, Any]:
    evidence = {
        name: value
        for name in ("index", "uuid", "serial", "error", "ecc_uncorrected", "recovery_action")
        if (value := getattr(gpu, name)) is not None
    }
    return {"verdict": rule.verdict, "reason": rule.reason, "source": rule.source, "evidence": evidence}


def _of_xid(xid: Xid) -> Judgement:
    verb = XID_VERBS.get(xid.code)
    if verb is None:
        verdict, source = Verdict.SUSPECT, f"{_CATALOGUE}: no resolution listed, or a workflow"
    else:
        verdict, source = _VERDICT_OF_VERB.get(verb, Verdict.HEALTHY), f"{_CATALOGUE}: {verb}"
    return Judgement(
        verdict=verdict,
        reason=f"xid_{xid.code}",
        source=source,
        evidence={"xid": xid.code, "pci": xid.pci, "line": xid.line},
        drill=xid.drill,
    )
