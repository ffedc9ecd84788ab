"""Burn-in of nodes → findings: what a device computes wrongly, forgets, or does slower than its like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from opt_ops.core.health.burn_in_plan import SHARED, TOLERANCE, GroupMeasurement, Slow, named, slower
from opt_ops.core.health.table import Judgement, Row, Verb, judgement
from opt_ops.core.values import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTest:
    """What a rank of the burn-in found of its device. None: it did not get that far."""

    node: str
    local: int
    device: str
    uuid: str | None = None
    error: str | None = None
    gemm_wrong: int | None = None
    memory_wrong: int | None = None
    link_wrong: int | None = None
    tflops: float | None = None
    to_gbs: float | None = None
    from_gbs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnIn:
    """All that a burn-in of some nodes gave."""

    nodes: tuple[str, ...]
    devices: tuple[DeviceTest, ...] = ()
    alone: tuple[GroupMeasurement, ...] = ()
    """All-reduce within each node; none where a node has one rank."""
    rounds: tuple[tuple[GroupMeasurement, ...], ...] = ()
    """All-reduce between nodes, round by round."""
    silent: tuple[str, ...] = ()
    """Nodes of which a rank gave no answer in time."""
    finished: bool = True
    """Whether there was time for every measurement that was wanted."""

    @property
    def tolerance(self) -> float:
        """By how much a good node may be slower than others."""
        return tolerance_of(self.devices)


CPU = "cpu"  # the device of a rank without a GPU


def tolerance_of(devices: Sequence[DeviceTest]) -> float:
    """Processors are shared, and their speed is not compared as that of GPUs is."""
    return SHARED if any(device.device == CPU for device in devices) else TOLERANCE


FLOORS: Mapping[str, float] = {"A100": 21.0, "H100": 48.0}
"""GB/s between host and GPU, either way, by what the card's name holds: Azure's node health checks."""

_MEDIAN = f"Megatron: slower than the median by more than {TOLERANCE:.0%} and by more than the median deviation"


def _row(reason: str, signal: str, verdict: Verdict, verb: Verb, source: str, disagree: str = "") -> Row:
    return Row(reason=f"burn_in_{reason}", signal=signal, verdict=verdict, verb=verb, source=source, disagree=disagree)


_WRONG = _row(
    "wrong",
    "burn-in: a matrix product, or data copied to the GPU and back, differs from the known result",
    Verdict.BAD,
    Verb.ISOLATE,
    "Imbue: compares matrix products on every host for 5 minutes; the clearest evidence of silent data corruption",
)
_MEMORY = _row(
    "memory",
    "burn-in: memory returns another pattern than was written",
    Verdict.BAD,
    Verb.ISOLATE,
    "DCGM: faulty memory isolates",
)
_FAILED = _row(
    "failed",
    "burn-in: the test of a GPU ended with an error",
    Verdict.SUSPECT,
    Verb.RESET_GPU,
    "opt-ops: a GPU that cannot run a test cannot train",
)
_SILENT = _row(
    "silent",
    "burn-in: a rank on the node did not answer in time",
    Verdict.SUSPECT,
    Verb.ISOLATE,
    "opt-ops: a node that hangs a test also hangs training",
)
_SLOW = _row("slow", "burn-in: a GPU multiplies slower than others of its name", Verdict.SUSPECT, Verb.ISOLATE, _MEDIAN)
_LINK = _row(
    "link",
    "burn-in: copies between host and GPU are slower than on others of its name, or than the card's floor "
    f"({', '.join(f'{card} {floor:g} GB/s' for card, floor in FLOORS.items())})",
    Verdict.SUSPECT,
    Verb.ISOLATE,
    f"{_MEDIAN}; Azure: the floors",
    "autopilot: at least 4 GB/s",
)
_ALL_REDUCE = _row(
    "all_reduce",
    "burn-in: all-reduce in the node, or with every partner node, is slower than on the others, fails, or gives a "
    "wrong sum",
    Verdict.SUSPECT,
    Verb.ISOLATE,
    _MEDIAN,
    "Azure: floors by card (H100 460 GB/s of 16 GB within a node); gcm: floors set by the site",
)
_NETWORK = _row(
    "network",
    "burn-in: no all-reduce between nodes worked, so no node can be named",
    Verdict.UNKNOWN,
    Verb.NONE,
    "opt-ops: of two nodes either can be slow; of more, the network is likelier than all of them",
)

_UNFINISHED = _row(
    "unfinished",
    "burn-in: not enough time for all measurements",
    Verdict.UNKNOWN,
    Verb.NONE,
    "opt-ops: a node that was not measured is neither fast nor slow",
)

BURNING_IN = "burning_in"
_BURNING = Row(
    reason=BURNING_IN,
    signal="the node's agent runs the burn-in (`health.burn_in_seconds`), once, before the first attempt there",
    verdict=Verdict.UNKNOWN,
    verb=Verb.NONE,
    source="opt-ops: neither fit nor unfit yet; attempts wait for it",
)

BURN_IN_ROWS = (_BURNING, _WRONG, _MEMORY, _FAILED, _SILENT, _SLOW, _LINK, _ALL_REDUCE, _NETWORK, _UNFINISHED)


def burning() -> Judgement:
    """The reason of a node's verdict while its burn-in runs."""
    return judgement(_BURNING, {})


def burned(found: BurnIn) -> Iterator[tuple[str, Judgement]]:
    """What follows for each node that something was found of, by the rows above."""
    for device in found.devices:
        yield from ((device.node, said) for said in _of_device(device))
    yield from _slow_devices(found.devices)
    for node in found.silent:
        yield node, judgement(_SILENT, {})
    within = {each.nodes[0]: each.gbs for each in found.alone}
    for node in (node for node, gbs in within.items() if gbs is None):
        yield node, judgement(_ALL_REDUCE, {"within": "failed"})
    for slow in slower({node: gbs for node, gbs in within.items() if gbs is not None}, found.tolerance):
        yield slow.name, judgement(_ALL_REDUCE, {"within": slow.value, "median": slow.median})
    groups = [group for measured in found.rounds for group in measured]
    if groups and all(group.gbs is None for group in groups):
        yield from ((node, judgement(_NETWORK, {"groups": len(groups)})) for node in found.nodes)
        return
    if not found.finished:
        yield from ((node, judgement(_UNFINISHED, {"rounds": len(found.rounds)})) for node in found.nodes)
    for slow in named(found.nodes, found.rounds, found.tolerance):
        partners = [[*group.nodes, group.gbs] for group in groups if slow.name in group.nodes]
        yield slow.name, judgement(_ALL_REDUCE, {"gbs": slow.value, "median": slow.median, "groups": partners})


def compared(each: Sequence[BurnIn]) -> Iterator[tuple[str, Judgement]]:
    """What burn-ins of single nodes show beside each other: what is slower than in most others."""
    devices = tuple(device for one in each for device in one.devices)
    yield from _slow_devices(devices)
    within = {group.nodes[0]: group.gbs for one in each for group in one.alone if group.gbs is not None}
    for slow in slower(within, tolerance_of(devices)):
        yield slow.name, judgement(_ALL_REDUCE, {"within": slow.value, "median": slow.median})


def _of_device(device: DeviceTest) -> Iterator[Judgement]:
    who: dict[str, object] = {"local_rank": device.local, "device": device.device}
    who |= {"uuid": device.uuid} if device.uuid is not None else {}
    if device.error is not None:
        yield judgement(_FAILED, {**who, "error": device.error})
    wrong = (device.gemm_wrong or 0) + (device.link_wrong or 0)
    if wrong:
        evidence = {"wrong_products": device.gemm_wrong, "wrong_words": device.link_wrong}
        yield judgement(_WRONG, {**who, **evidence})
    if device.memory_wrong:
        yield judgement(_MEMORY, {**who, "wrong_words": device.memory_wrong})
    floor = next((floor for card, floor in FLOORS.items() if card in device.device), 0.0)
    rates = {"to": device.to_gbs, "from": device.from_gbs}
    for way, gbs in rates.items():
        if gbs is not None and gbs < floor:
            yield judgement(_LINK, {**who, "way": way, "gbs": gbs, "floor": floor})


def _slow_devices(devices: Sequence[DeviceTest]) -> Iterator[tuple[str, Judgement]]:
    for name in sorted({device.device for device in devices} - {CPU}):
        alike = {f"{each.node}/{each.local}": each for each in devices if each.device == name}
        figures: tuple[tuple[Row, str, dict[str, float | None]], ...] = (
            (_SLOW, "tflops", {key: each.tflops for key, each in alike.items()}),
            (_LINK, "to_gbs", {key: each.to_gbs for key, each in alike.items()}),
            (_LINK, "from_gbs", {key: each.from_gbs for key, each in alike.items()}),
        )
        for row, figure, values in figures:
            for slow in slower({key: value for key, value in values.items() if value is not None}):
                yield alike[slow.name].node, judgement(row, _evidence(alike[slow.name], figure, slow))


def _evidence(device: DeviceTest, figure: str, slow: Slow) -> Mapping[str, object]:
    who: dict[str, object] = {"local_rank": device.local, "device": device.device}
    who |= {"uuid": device.uuid} if device.uuid is not None else {}
    return {**who, figure: slow.value, "median": slow.median}
