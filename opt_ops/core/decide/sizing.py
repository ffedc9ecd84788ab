"""What the failures so far say about the next weeks: how often to save, how many spares to hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opt_ops.core.failures.classes import Domain, Nature, nature, row
from opt_ops.core.state.model import State

_OF_NODES = (Domain.HARDWARE, Domain.PERFORMANCE)  # a node goes away to be repaired
_ENOUGH_SECONDS = 86400.0
_ENOUGH_FAILURES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Suggestions with the numbers that they follow from. Times in seconds."""

    running_seconds: float
    failures: int
    node_failures: int
    seconds_between_failures: float
    save_seconds: float | None
    interval_seconds: float | None
    spares: int | None


def recommend(state: State, save_seconds: float | None, repair_hours: float, now: float) -> Recommendation:
    """Save interval and spares from a lineage's own record; drills and planned moves aside.

    The rate is (failures + 1/2) / time, the mean of its posterior under Jeffreys' prior: no failure yet does not mean
    that none will come. The interval is √(2 × cost of a save × time between failures) (Young 1974). The spares are
    those that suffice in 99 of 100 cases for the nodes that fail while one is being repaired (Poisson). Neither is
    suggested before there has been a day, or three failures, to go by.

    Args:
        state: The lineage.
        save_seconds: How long a save holds training up; None: not known.
        repair_hours: From a node's failure until it is back.
        now: Seconds since the epoch.
    """
    real = [i for i in state.incidents.values() if i.drill is None and nature(i.kind, i.signal) is Nature.FAULT]
    running = sum(
        max(0.0, (attempt.ended_at or now) - attempt.started_at)
        for attempt in state.attempts.values()
        if attempt.started_at is not None
    )
    nodes = sum(row(incident.kind).domain in _OF_NODES for incident in real)
    between = running / (len(real) + 0.5) if running else math.inf
    expected = (nodes + 0.5) / running * repair_hours * 3600 if running else 0.0
    enough = running >= _ENOUGH_SECONDS or len(real) >= _ENOUGH_FAILURES
    interval = math.sqrt(2 * save_seconds * between) if save_seconds and running and enough else None
    return Recommendation(
        running_seconds=running,
        failures=len(real),
        node_failures=nodes,
        seconds_between_failures=between,
        save_seconds=save_seconds,
        interval_seconds=interval,
        spares=_quantile(expected, 0.99) if enough else None,
    )


def _quantile(mean: float, share: float) -> int:
    """The smallest number that a Poisson variable stays at or below with this probability."""
    if mean > 200:  # by its normal approximation: e⁻²⁰⁰ leaves no digits
        return math.ceil(mean + 2.326 * math.sqrt(mean))
    term = total = math.exp(-mean)
    number = 0
    while total < share:
        number += 1
        term *= mean / number
        total += term
    return number
