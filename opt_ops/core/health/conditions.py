"""When a row of the table applies to a GPU, a port, a node.

A condition answers None where the driver, the card or the host does not say: then nothing follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opt_ops.core.health.history import History
from opt_ops.core.health.readings import Gpu, Heartbeat, Port
from opt_ops.core.health.table import Row


@dataclass(frozen=True, slots=True)
class NodeReading:
    """A heartbeat, and what is remembered of its node."""

    now: Heartbeat
    history: History
    expected_gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow(Row):
    """A row about each GPU."""

    applies: Callable[[Gpu, NodeReading], bool | None]
    shows: tuple[str, ...] = ()
    """Fields of the GPU that go into the evidence, after its identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRow(Row):
    """A row about each network port."""

    applies: Callable[[Port, NodeReading], bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow(Row):
    """A row about the node as a whole."""

    applies: Callable[[NodeReading], bool | None]
    shows: Callable[[NodeReading], Mapping[str, object]]
    """What goes into the evidence."""


NVML_HW_SLOWDOWN, NVML_SW_THERMAL, NVML_HW_THERMAL, NVML_POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
_LOADED = 50  # percent of utilization
LEFTOVER = 512 * 2**20
CORRECTED = 50_000_000
UNCORRECTED_EVER = 15
CARRIERS = 5  # losses of an Ethernet adapter in a day
ROWS, PAGES, SRAM = 512, 63, 4
_PER_LANE = {1: 0.15, 2: 0.3, 3: 0.48, 4: 0.96, 5: 1.92, 6: 3.84}  # PCIe replays a minute, by generation
_NVLINK_PER_MINUTE = 1.0
MINUTE = 30  # readings

RESETS = ("gpu_reset", "drain_p2p", "drain_and_reset", "bus_reset")
REBOOTS = ("node_reboot", "system_reboot")


def over(name: str, limit: float) -> Callable[[Gpu, NodeReading], bool | None]:
    """A number of the GPU is above the limit."""

    def applies(gpu: Gpu, sight: NodeReading) -> bool | None:
        value = getattr(gpu, name)
        return None if value is None else value > limit

    return applies


def says(name: str, wanted: bool = True) -> Callable[[Gpu, NodeReading], bool | None]:
    """A flag of the GPU is as given."""

    def applies(gpu: Gpu, sight: NodeReading) -> bool | None:
        value = getattr(gpu, name)
        return None if value is None else value is wanted

    return applies


def throttled(bits: int, without: int = 0) -> Callable[[Gpu, NodeReading], bool | None]:
    """One of these clocks event reasons is set, and none of the others."""

    def applies(gpu: Gpu, sight: NodeReading) -> bool | None:
        return None if gpu.throttle is None else bool(gpu.throttle & bits) and not gpu.throttle & without

    return applies


def asks(*actions: str) -> Callable[[Gpu, NodeReading], bool | None]:
    """The driver's recovery action is one of these."""
    return lambda gpu, _: None if gpu.recovery_action is None else gpu.recovery_action in actions


def too_hot(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Above the card's own limit."""
    return _above(gpu.temperature, gpu.temperature_limit)


def memory_too_hot(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Above the card's own limit for its memory."""
    return _above(gpu.memory_temperature, gpu.memory_temperature_limit)


def _above(now: int | None, limit: int | None) -> bool | None:
    return None if now is None or not limit else now > limit


def less(now: int | None, most: int | None) -> bool | None:
    """Below the most that is possible."""
    return None if now is None or not most else now < most


def under_load(gpu: Gpu) -> bool:
    """Whether the GPU works: what saves power at idle is no finding."""
    return gpu.utilization is not None and gpu.utilization >= _LOADED


def narrow(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Fewer PCIe lanes than possible, under load."""
    return less(gpu.pcie_width, gpu.pcie_width_most) if under_load(gpu) else None


def slow(gpu: Gpu, sight: NodeReading) -> bool | None:
    """A lower PCIe generation than possible, under load."""
    return less(gpu.pcie_generation, gpu.pcie_generation_most) if under_load(gpu) else None


def replays(gpu: Gpu, sight: NodeReading) -> bool | None:
    """PCIe replays above DCGM's rate for the link's generation and width."""
    rate = sight.history.rates.get((gpu.index, "pcie_replays"))
    per_lane = _PER_LANE.get(gpu.pcie_generation or 0)
    if rate is None or per_lane is None or gpu.pcie_width is None:
        return None
    return rate > -(-per_lane * gpu.pcie_width // 1)


def link_errors(gpu: Gpu, sight: NodeReading) -> bool | None:
    """NVLink replays and recoveries at a rate that matters."""
    rate = sight.history.rates.get((gpu.index, "nvlink_errors"))
    return None if rate is None else rate >= _NVLINK_PER_MINUTE


def link_down(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Fewer NVLinks than the sisters have, or than there were."""
    if gpu.nvlinks is None:
        return None
    sisters = [other.nvlinks for other in sight.now.gpus if other.name == gpu.name and other.nvlinks is not None]
    return gpu.nvlinks < max(*sisters, sight.history.nvlinks.get(gpu.index, 0), 0)


def changed(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Another card than at first."""
    known = sight.history.uuids.get(gpu.index)
    return None if known is None or gpu.uuid is None else known != gpu.uuid


def left_over(gpu: Gpu, sight: NodeReading) -> bool | None:
    """Somebody is still on the GPU of a node that has GPUs of its own: nodes without may share a machine's."""
    if sight.expected_gpus == 0 or (gpu.memory_used is None and gpu.processes is None):
        return None
    return bool(gpu.processes) or (gpu.memory_used or 0) > LEFTOVER


def port_down(port: Port, sight: NodeReading) -> bool | None:
    """A port that was up is not."""
    if port.active is None or port.name not in sight.history.ports_seen_up:
        return None
    return not port.active


def port_flaps(port: Port, sight: NodeReading) -> bool | None:
    """A port went down three times."""
    first = sight.history.ports_downed.get(port.name)
    return None if first is None or port.downed is None else port.downed - first >= 3


def missing(sight: NodeReading) -> bool | None:
    """Fewer GPUs than there should be, or than there were."""
    if sight.now.nvml != "ok":
        return None
    there = {gpu.uuid for gpu in sight.now.gpus}
    gone = len(sight.now.gpus) < len(sight.history.uuids) and not set(sight.history.uuids.values()) <= there
    return len(sight.now.gpus) < sight.expected_gpus or gone


def disk_low(sight: NodeReading) -> bool | None:
    """The disk of the run folder is nearly full."""
    machine = sight.now.machine
    return None if machine.disk_free is None or not machine.disk_size else machine.disk_free < machine.disk_size / 50


def lost_mounts(sight: NodeReading) -> list[str]:
    """What could be written in this allocation and is not mounted any more."""
    mounts = sight.now.machine.mounts
    return [] if mounts is None else sorted(sight.history.mounts - mounts.keys())


def read_only_mounts(sight: NodeReading) -> list[str]:
    """What could be written in this allocation and cannot any more."""
    mounts = sight.now.machine.mounts or {}
    return sorted(path for path in sight.history.mounts & mounts.keys() if not mounts[path])


def carriers_lost(sight: NodeReading) -> dict[str, int]:
    """By adapter, how often within these 24 hours."""
    before = sight.history.carriers
    return {name: count - before.get(name, count) for name, count in sight.now.machine.carriers.items()}


def carrier_flaps(sight: NodeReading) -> bool | None:
    """An Ethernet adapter lost its carrier as often as that."""
    return None if not sight.history.carriers else max(carriers_lost(sight).values(), default=0) >= CARRIERS


def clock_unset(sight: NodeReading) -> bool | None:
    """Nothing keeps the clock right; of nodes that are held, the clocks themselves are compared."""
    kept = sight.now.machine.clock_set
    return None if kept is None or sight.now.allocation is not None else not kept
