"""What is remembered of a node between heartbeats, for what counts only in a row, at a rate, or when it comes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from opt_ops.core.health.readings import Gpu, Heartbeat, Xid

RATE_SECONDS = 60.0
DAY = 86400.0
_COUNTERS = ("pcie_replays", "nvlink_errors")


@dataclass(frozen=True, slots=True)
class Found:
    """A row on a part: how many readings in a row it applies, and when it began to, each time."""

    streak: int = 0
    began: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """One node's; equal histories judge a heartbeat equally."""

    allocation: str | None = None
    uuids: Mapping[int, str] = field(default_factory=dict[int, str])
    """By index, at the first reading of the allocation."""
    nvlinks: Mapping[int, int] = field(default_factory=dict[int, int])
    """The most that were up, by index."""
    ports_seen_up: frozenset[str] = frozenset()
    ports_downed: Mapping[str, int] = field(default_factory=dict[str, int])
    """Their counters at the first reading."""
    mounts: frozenset[str] = frozenset()
    """Those that could be written, at any time in the allocation."""
    carriers: Mapping[str, int] = field(default_factory=dict[str, int])
    """The counters at the beginning of these 24 hours."""
    carriers_at: float = 0.0
    counters_at: float = 0.0
    counters: Mapping[tuple[int, str], int] = field(default_factory=dict[tuple[int, str], int])
    rates: Mapping[tuple[int, str], float] = field(default_factory=dict[tuple[int, str], float])
    """A minute, over the last full minute, by GPU and counter."""
    found: Mapping[tuple[str, str], Found] = field(default_factory=dict[tuple[str, str], Found])
    """By row and part."""
    xids: tuple[Xid, ...] = ()
    """Findings of earlier daemon processes, as far as they were journaled."""

    @property
    def streaks(self) -> bool:
        """Whether anything applied at the newest reading."""
        return any(found.streak for found in self.found.values())

    @property
    def counts(self) -> bool:
        """Whether the passing of time may change it, without any new reading."""
        return bool(self.counters or self.carriers)


def measured(history: History, heartbeat: Heartbeat) -> History:
    """The history with a heartbeat's identities, links, ports and counters; a new allocation starts empty."""
    if heartbeat.allocation != history.allocation:
        history = History(allocation=heartbeat.allocation, found=history.found, xids=history.xids)
    history = _host(history, heartbeat)
    if heartbeat.nvml != "ok":
        return history
    uuids = {gpu.index: gpu.uuid for gpu in heartbeat.gpus if gpu.uuid is not None}
    links = {gpu.index: gpu.nvlinks for gpu in heartbeat.gpus if gpu.nvlinks is not None}
    ports = heartbeat.machine.ports
    downed = {port.name: port.downed for port in ports if port.downed is not None}
    at, counters, rates = _rates(history, heartbeat)
    return replace(
        history,
        uuids={**uuids, **history.uuids},
        nvlinks={**history.nvlinks, **{i: max(n, history.nvlinks.get(i, 0)) for i, n in links.items()}},
        ports_seen_up=history.ports_seen_up | {port.name for port in ports if port.active},
        ports_downed={**downed, **history.ports_downed},
        counters_at=at,
        counters=counters,
        rates=rates,
    )


def _host(history: History, heartbeat: Heartbeat) -> History:
    """With what is remembered of the host: its mounts, and how often its adapters had lost their carrier."""
    machine = heartbeat.machine
    writable = {path for path, writes in (machine.mounts or {}).items() if writes}
    if not writable <= history.mounts:
        history = replace(history, mounts=history.mounts | writable)
    if machine.carriers and not 0 <= heartbeat.ts - history.carriers_at < DAY:
        return replace(history, carriers=machine.carriers, carriers_at=heartbeat.ts)
    if not machine.carriers.keys() <= history.carriers.keys():
        return replace(history, carriers={**machine.carriers, **history.carriers})
    return history


def _rates(
    history: History, heartbeat: Heartbeat
) -> tuple[float, Mapping[tuple[int, str], int], Mapping[tuple[int, str], float]]:
    """When the counters were last taken, what they were, and the rates since the time before."""
    seconds = heartbeat.ts - history.counters_at
    if history.counters and 0 <= seconds < RATE_SECONDS:
        return history.counters_at, history.counters, history.rates
    now = {
        (gpu.index, name): value
        for gpu in heartbeat.gpus
        for name in _COUNTERS
        if (value := _counter(gpu, name)) is not None
    }
    if not history.counters or seconds < 0:
        return (heartbeat.ts if now else 0.0), now, {}
    # A counter that fell was reset: it says nothing about this minute.
    rates = {
        key: (value - before) * 60 / seconds
        for key, value in now.items()
        if (before := history.counters.get(key)) is not None and value >= before
    }
    return heartbeat.ts, now, rates


def _counter(gpu: Gpu, name: str) -> int | None:
    return gpu.pcie_replays if name == "pcie_replays" else gpu.nvlink_errors
