"""What an agent read of its node. None: the driver, the card or the host does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opt_ops.core.health.burn_in_findings import BurnIn


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What NVML said of one GPU. None: the driver does not say."""

    index: int
    uuid: str | None = None
    serial: str | None = None
    name: str | None = None
    pci: str | None = None  # 0000:3b:00, as the kernel log names it
    inforom: str | None = None
    vbios: str | None = None
    error: str | None = None  # the GPU as a whole cannot be read: gpu_is_lost, …
    recovery_action: str | None = None
    ecc_on: bool | None = None
    ecc_on_next: bool | None = None  # after the next reset
    ecc_uncorrected: int | None = None  # volatile: since the driver was loaded
    ecc_corrected: int | None = None  # volatile
    ecc_uncorrected_ever: int | None = None  # aggregate: in the card's life
    sram_uncorrected_ever: int | None = None
    sram_over_threshold: bool | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    rows_remapped: int | None = None  # after uncorrectable errors
    retired_pages: int | None = None  # before Ampere
    retired_pending: bool | None = None
    temperature: int | None = None  # °C
    temperature_limit: int | None = None  # °C, the card's own highest for work
    memory_temperature: int | None = None  # °C
    memory_temperature_limit: int | None = None  # °C, the card's own
    power_watts: float | None = None
    throttle: int | None = None  # NVML's bits of clocks event reasons
    utilization: int | None = None  # percent of the last second or so
    memory_used: int | None = None  # bytes, the driver's own left out
    processes: int | None = None
    persistence: bool | None = None
    clock_most: int | None = None  # MHz, of the multiprocessors
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    pcie_generation: int | None = None
    pcie_generation_most: int | None = None
    pcie_replays: int | None = None  # a counter
    nvlinks: int | None = None  # that are up
    nvlink_errors: int | None = None  # a counter: replays and recoveries of all links
    fabric: str | None = None  # not_started, in_progress, completed, failed, degraded: by the fabric manager


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An error of a GPU (Xid) or an NVSwitch (SXid), seen since the agent started: once or many times."""

    code: int  # 0: the line has no number, and `kind` says what it reports
    pci: str
    line: str  # the first one
    at: float  # the last time
    drill: str | None = None
    switch: bool = False
    kind: str = ""  # kernel_lines.Kind
    first_at: float | None = None  # None: the same as `at`
    count: int = 1
    recurred: bool = False  # two of the times are more than a minute and less than seven days apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of an InfiniBand or RoCE adapter, by sysfs."""

    name: str  # mlx5_0/1
    active: bool | None = None
    downed: int | None = None  # a counter: how often the link went down


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The host beside its GPUs."""

    ports: tuple[Port, ...] = ()
    carriers: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of each Ethernet adapter, a counter: how often it lost its carrier."""
    mounts: Mapping[str, bool] | None = None
    """File systems of disks and networks, by where they are mounted: whether they can be written."""
    clock_set: bool | None = None  # the kernel's clock is kept right by NTP or PTP
    disk_free: int | None = None  # bytes for us, where checkpoints go
    disk_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The evaluation of a checkpoint that a node runs, or has run as long as it is ordered."""

    name: str
    code: int | None = None  # None: it runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One line of a node's health file."""

    node: str
    host: str
    ts: float
    attempt: str | None
    nvml: str  # ok, absent, hung, or NVML's error name
    orders: tuple[int, int] = (0, 0)  # epoch and sequence number of the orders it last acted on
    orders_refused: str | None = None  # why its agent does not obey the orders that are there now
    gpus: tuple[Gpu, ...] = ()
    xids: tuple[Xid, ...] = ()
    allocation: str | None = None  # through which the agent holds the node
    warned: bool = False  # the scheduler has said that it will end soon
    driver: str | None = None
    machine: Machine = Machine()
    burning: bool = False  # its agent tests it
    burn_in: BurnIn | None = None  # what came of it
    burned_at: float = 0.0
    peer_lost: bool = False  # a rank of it has lost a peer, and waits for a newer generation of the membership
    standby: int = 0  # warm ranks that wait there for a place, and have done all that needs no other rank
    energy_joules: float | None = None  # a counter: of all GPUs, since the driver was loaded
    evaluation: EvaluationReport | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing of ours uses its GPUs: no rank, no standby, no evaluation."""
        evaluates = self.evaluation is not None and self.evaluation.code is None
        return self.attempt is None and not self.standby and not evaluates
