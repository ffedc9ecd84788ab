"""What each cause has cost: node-hours, energy, emissions and money, by failure class and by phase of the wall clock.

Every part of the wall clock has one cause (`wall_clock.Span`). Held nodes and metered energy are divided by the parts
that they overlap, so the sums over causes are the totals. What lies outside the wall clock, such as nodes that are
held after the end, is counted to `other`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chronicles.ledger.wall_clock import Ledger, Span, TimePhase
from chronicles.record import LineageRecord
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.values import HOLDING, AllocationStatus

_ROUNDING_SECONDS = 1e-6  # that sums of differences of times may be off


@dataclass(frozen=True, slots=True, kw_only=True)
class SpentOnKind:
    """What one failure class has cost, or a phase of the wall clock. None: not metered, or the site has set no rate."""

    kind: str = field(metadata={"key": "cause"})
    incidents: int
    seconds: float
    node_hours: float | None
    kwh: float | None
    tco2e: float | None
    cost: float | None
    unmetered_seconds: float  # in which no energy counter was read: their energy is unknown, and not estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Nodes that an allocation held between two moments."""

    begin: float
    end: float
    nodes: int


def held(record: LineageRecord, end: float) -> list[Held] | None:
    """When how many nodes were held, spares included; None where another launcher holds the nodes."""
    if not record.state.allocations:
        return None
    found: list[Held] = []
    now: dict[str, tuple[float, int]] = {}
    for entry in record.entries:
        event = entry.event
        if isinstance(event, e.AllocationChanged) and event.status is not AllocationStatus.UNKNOWN:
            since, number = now.pop(event.allocation, (entry.ts, 0))
            found.append(Held(begin=since, end=entry.ts, nodes=number))
            if event.status in HOLDING:
                now[event.allocation] = (entry.ts, len(event.nodes))
    found += [Held(begin=since, end=max(since, end), nodes=number) for since, number in now.values()]
    return [each for each in found if each.nodes]


def metered(record: LineageRecord) -> list[e.EnergyMetered]:
    """What the GPUs of all held nodes used, by their counters."""
    return [entry.event for entry in record.entries if isinstance(entry.event, e.EnergyMetered)]


def kwh_of(joules: float) -> float:
    """Joules as kWh."""
    return joules / 3.6e6


def emissions(kwh: float | None, rates: Rates) -> float | None:
    """Tonnes of CO2 equivalents; None without energy, or without a factor of the grid whose source is named."""
    if kwh is None or rates.kg_co2e_per_kwh is None or rates.factor_source is None:
        return None
    return kwh * rates.kg_co2e_per_kwh / 1000


def cost(kwh: float | None, node_hours: float | None, rates: Rates) -> float | None:
    """Money, by the factors that are given; None if there is none."""
    prices = [(kwh, rates.cost_per_kwh), (node_hours, rates.cost_per_node_hour)]
    known = [amount * price for amount, price in prices if amount is not None and price is not None]
    return sum(known) if known else None


@dataclass(slots=True)
class Spent:
    """What one incident or one phase has cost."""

    seconds: float = 0.0
    node_seconds: float = 0.0
    joules: float = 0.0
    metered_seconds: float = 0.0


def by_kind(record: LineageRecord, causes: Mapping[str, Spent], rates: Rates) -> tuple[SpentOnKind, ...]:
    """A row for each failure class and phase, kept training included; the most expensive in seconds first."""
    kinds: defaultdict[str, Spent] = defaultdict(Spent)
    for cause, sums in causes.items():
        into = kinds[_kind(cause, record.state)]
        into.seconds += sums.seconds
        into.node_seconds += sums.node_seconds
        into.joules += sums.joules
        into.metered_seconds += sums.metered_seconds
    incidents = [incident.kind for incident in record.state.incidents.values()]
    has_nodes, has_energy = bool(record.state.allocations), bool(metered(record))
    rows: list[SpentOnKind] = []
    for kind, sums in kinds.items():
        hours = sums.node_seconds / 3600 if has_nodes else None
        kwh = kwh_of(sums.joules) * rates.pue if has_energy else None
        rows.append(
            SpentOnKind(
                kind=kind,
                incidents=incidents.count(kind),
                seconds=sums.seconds,
                node_hours=hours,
                kwh=kwh,
                tco2e=emissions(kwh, rates),
                cost=cost(kwh, hours, rates),
                unmetered_seconds=max(0.0, sums.seconds - sums.metered_seconds),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.seconds, row.kind)))


def by_cause(record: LineageRecord, book: Ledger) -> dict[str, Spent]:
    """What each incident and each phase has cost."""
    found: defaultdict[str, Spent] = defaultdict(Spent)
    begins = [span.begin for span in book.spans]
    for span in book.spans:
        found[span.cause].seconds += span.end - span.begin
    for each in held(record, (record.started or 0.0) + book.wall) or ():
        for cause, seconds in _parts(book.spans, begins, each.begin, each.end):
            found[cause].node_seconds += each.nodes * seconds
    for event in metered(record):
        length = event.until - event.since
        for cause, seconds in _parts(book.spans, begins, event.since, event.until):
            found[cause].joules += event.joules * seconds / length
            found[cause].metered_seconds += seconds
    return found


def _parts(spans: Sequence[Span], begins: Sequence[float], begin: float, end: float) -> Iterator[tuple[str, float]]:
    """The time between two moments, by cause; what lies outside the wall clock is `other`."""
    left = end - begin
    for index in range(max(0, bisect_right(begins, begin) - 1), len(spans)):
        span = spans[index]
        if span.begin >= end:
            break
        seconds = min(end, span.end) - max(begin, span.begin)
        if seconds > 0:
            left -= seconds
            yield span.cause, seconds
    if left > _ROUNDING_SECONDS:
        yield TimePhase.OTHER, left


def _kind(cause: str, state: State) -> str:
    """The failure class of an incident; of a phase, the phase."""
    return state.incidents[cause].kind if cause in state.incidents else cause
