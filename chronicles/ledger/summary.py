"""The ledger in numbers for programs: reliability, restarts, nodes, energy and money. docs/ledger.md defines each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from chronicles.ledger.wall_clock import Ledger, Phase, Stage, ledger
from chronicles.operators import halts, is_planned
from chronicles.record import LineageRecord
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.state.model import Incident, State
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, AllocationStatus, Severity

_JOULES_PER_KWH = 3.6e6


def account(record: LineageRecord, rates: Rates | None = None) -> dict[str, Any]:
    """Everything that the ledger knows of a lineage, as plain JSON values; from the journal alone.

    Args:
        record: Of which only the journal is looked at.
        rates: The site's figures, for shares of an ideal, emissions and money.
    """
    rates = rates or Rates()
    book, state = ledger(record), record.state
    kept = book.steps_kept * (book.healthy_step_seconds or 0.0)
    slower = book.phases[Phase.KEPT] - kept if book.healthy_step_seconds else None
    return {
        "kept_steps": book.steps_kept,
        "healthy_step_seconds": book.healthy_step_seconds,
        "wall_seconds": book.wall,
        "goodput": book.goodput,
        "steps_repeated": book.steps_repeated,
        "seconds_by_phase": {phase: book.phases[phase] for phase in Phase},
        "lost": [
            {"cause": cause, "seconds_repeated": book.repeated(cause), "seconds_down": book.down(cause)}
            for cause in sorted(book.lost)
            if cause != Phase.OTHER and any(book.lost[cause].values())
        ],
        "seconds_slower_than_healthy": slower,
        "ideal_step_seconds": rates.ideal_step_seconds or book.bare_step_seconds,
        "share_of_ideal": book.share_of_ideal(rates.ideal_step_seconds),
        "ettr": book.ettr,
        "seconds_saving": book.seconds_saving,
        "lost_by_kind": _by_kind(book, state),
        "seconds_by_stage": _by_stage(book),
        **_reliability(record, book),
        **_people(record, book),
        **_bill(record, book, rates),
    }


def _by_kind(book: Ledger, state: State) -> list[dict[str, Any]]:
    """Lost time by failure class or phase, the dearest first."""
    kinds: defaultdict[str, defaultdict[Stage, float]] = defaultdict(lambda: defaultdict(float))
    incidents: defaultdict[str, list[Incident]] = defaultdict(list)
    for incident in state.incidents.values():
        incidents[incident.kind].append(incident)
    for cause, stages in book.lost.items():
        kind = state.incidents[cause].kind if cause in state.incidents else cause
        for stage, seconds in stages.items():
            kinds[kind][stage] += seconds
    rows = [
        {
            "kind": kind,
            "incidents": len(incidents[kind]),
            "drills": sum(incident.drill is not None for incident in incidents[kind]),
            "seconds": sum(stages.values()),
            "seconds_by_stage": {stage: stages[stage] for stage in Stage},
        }
        for kind, stages in kinds.items()
        if any(stages.values()) or incidents[kind]
    ]
    return sorted(rows, key=lambda row: (-row["seconds"], row["kind"]))


def _by_stage(book: Ledger) -> dict[str, float]:
    return {stage: sum(stages[stage] for stages in book.lost.values()) for stage in Stage}


# ---- failures, restarts, people ----


def _reliability(record: LineageRecord, book: Ledger) -> dict[str, Any]:
    """A failure ended an attempt, unasked and on no drill; a recovery led from one, or a drill, to a next attempt."""
    found = [i for i in record.state.incidents.values() if _stopped_training(i)]
    failures = [i for i in found if i.drill is None]
    trained = book.phases[Phase.KEPT] + book.phases[Phase.LOST]
    downs = [i.seconds_down for i in found if i.seconds_down is not None and i.next_attempt]
    seen = [max(0.0, i.opened_at - i.at) for i in found]
    return {
        "failures": len(failures),
        "mtbf_seconds": trained / len(failures) if failures else None,
        "recoveries": len(downs),
        "mttr_seconds": sum(downs) / len(downs) if downs else None,
        "mean_seconds_to_see": sum(seen) / len(seen) if seen else None,
        **_restarts(record),
    }


def _stopped_training(incident: Incident) -> bool:
    decision = incident.decision
    stops = decision is not None and decision.action in (Action.RESTART, Action.ROLLBACK, Action.HALT)
    planned = is_planned(incident.kind, incident.signal) or incident.kind == "operator"
    return stops and incident.acted_on and not planned


def _restarts(record: LineageRecord) -> dict[str, int]:
    """Launches after the first, each in exactly one of three ways; requeues stand beside them."""
    counts = {"manual": 0, "planned": 0, "automatic": 0}
    asked, first = False, True
    for entry in record.entries:
        event = entry.event
        if isinstance(event, (e.ResumeRequested, e.ChangeRequested)):
            asked = True
        elif isinstance(event, e.AttemptIntended):
            if not first:
                counts[_way(record.state, event, asked)] += 1
            asked, first = False, False
    submitted = sum(isinstance(entry.event, e.AllocationSubmitted) for entry in record.entries)
    named = {f"restarts_{way}": number for way, number in counts.items()}
    return {"restarts": sum(counts.values()), **named, "requeues": max(0, submitted - 1)}


def _way(state: State, event: e.AttemptIntended, asked: bool) -> str:
    incident = state.incidents.get(event.incident or "")
    if asked or (incident is not None and incident.kind == "operator"):
        return "manual"
    return "planned" if incident is not None and is_planned(incident.kind, incident.signal) else "automatic"


def _people(record: LineageRecord, book: Ledger) -> dict[str, Any]:
    """Calls, and the longest time between two of them; what people chose to do unasked is no call."""
    if record.started is None:
        return {"calls": 0, "longest_hands_off_seconds": None}
    end = record.started + book.wall
    calls = list(_calls(record, end))
    free, since = [0.0], record.started
    for begin, answered in sorted(calls):
        free.append(begin - since)
        since = max(since, answered)
    free.append(end - since)
    return {"calls": len(calls), "longest_hands_off_seconds": max(free)}


def _calls(record: LineageRecord, end: float) -> Iterator[tuple[float, float]]:
    """From when until when a human was needed: halts until they were answered; other pages, at that moment."""
    told = {row["alert"] for row in halts(record)}
    for row in halts(record):
        yield from_iso(row["at"]), from_iso(row["answered"]) if row["answered"] else end
    for name, alert in record.state.alerts.items():
        if alert.told.severity is Severity.PAGE and name not in told:
            yield alert.at, alert.at


# ---- nodes, energy, money ----


def _bill(record: LineageRecord, book: Ledger, rates: Rates) -> dict[str, Any]:
    hours = _node_hours(record, (record.started or 0.0) + book.wall)
    metered = [entry.event for entry in record.entries if isinstance(entry.event, e.EnergyMetered)]
    gpu_kwh = sum(event.joules for event in metered) / _JOULES_PER_KWH if metered else None
    kwh = gpu_kwh * rates.pue if gpu_kwh is not None else None
    prices = [(kwh, rates.cost_per_kwh), (hours, rates.cost_per_node_hour)]
    costs = [amount * price for amount, price in prices if amount is not None and price is not None]
    share = book.phases[Phase.KEPT] / book.wall if book.wall else None
    co2 = kwh * rates.kg_co2e_per_kwh / 1000 if kwh is not None and rates.kg_co2e_per_kwh is not None else None
    return {
        "node_hours": hours,
        "node_hours_lost": hours * (1 - share) if hours is not None and share is not None else None,
        "gpu_kwh": gpu_kwh,
        "metered_seconds": sum(event.until - event.since for event in metered),
        "kwh": kwh,
        "tco2e": co2,
        "cost": sum(costs) if costs else None,
        "currency": rates.currency,
    }


def _node_hours(record: LineageRecord, end: float) -> float | None:
    """Nodes held × hours, spares included, over all allocations; None where another launcher holds them."""
    if not record.state.allocations:
        return None
    seconds = 0.0
    held: dict[str, tuple[float, int]] = {}
    for entry in record.entries:
        event = entry.event
        if isinstance(event, e.AllocationChanged) and event.status is not AllocationStatus.UNKNOWN:
            since, number = held.pop(event.allocation, (entry.ts, 0))
            seconds += number * (entry.ts - since)
            if event.status is AllocationStatus.RUNNING:
                held[event.allocation] = (entry.ts, len(event.nodes))
    seconds += sum(number * max(0.0, end - since) for since, number in held.values())
    return seconds / 3600


def node_hours_lost(state: State, spent: Mapping[str, Any]) -> dict[str, float | None]:
    """What each incident cost: standstill and repeated steps, on the nodes of the attempt that it hit."""
    seconds = {row["cause"]: row["seconds_repeated"] + row["seconds_down"] for row in spent["lost"]}
    nodes = {i.name: len(state.attempts[i.attempt].nodes) if i.attempt else 0 for i in state.incidents.values()}
    return {name: seconds.get(name, 0.0) * number / 3600 if number else None for name, number in nodes.items()}
