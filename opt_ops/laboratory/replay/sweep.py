"""Many replays of one scenario: over seeds, and with varied spares, save interval and detection delay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from opt_ops.laboratory.replay.fault_plan import sample
from opt_ops.laboratory.replay.measure import DAY, ReplayResult, measure
from opt_ops.laboratory.replay.play import play
from opt_ops.laboratory.replay.scenario import Scenario
from opt_ops.laboratory.replay.trace import IncidentTrace
from opt_ops.laboratory.replay.write_runfolder import write_telemetry

HANDS_OFF_DAYS = 14.0
"""What Meta wished for after OPT-175B."""


@dataclass(frozen=True, slots=True)
class SeedStatistics:
    """A mean over seeds, with its spread."""

    mean: float
    sd: float
    least: float
    most: float


def over_seeds(values: Iterable[float | None]) -> SeedStatistics | None:
    """Return mean and spread; None if there are no values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return SeedStatistics(mean(known), stdev(known) if len(known) > 1 else 0.0, min(known), max(known))


def replay(
    scenario: Scenario,
    record: IncidentTrace | None,
    seeds: Sequence[int],
    tick_seconds: float = 1.0,
    progress: Callable[[int, float], None] | None = None,
    keep: Path | None = None,
) -> list[ReplayResult]:
    """Replay each seed.

    Args:
        scenario: The scenario.
        record: The record of incidents; None: every fault is sampled.
        seeds: The seeds.
        tick_seconds: Detection delay: time between two ticks of the supervisor.
        progress: Called with the seed and the share of its steps.
        keep: Folder for the run folder of the first seed; None: none is kept.
    """
    found: list[ReplayResult] = []
    for seed in seeds:
        fault_plan = sample(scenario, record, seed)

        def report(share: float, seed: int = seed) -> None:
            if progress is not None:
                progress(seed, share)

        played = play(scenario, fault_plan, tick_seconds, keep if keep and not found else None, report)
        if keep and not found:
            write_telemetry(keep, played.world)
        found.append(measure(scenario, fault_plan, played))
    return found


def summary(measured: Sequence[ReplayResult]) -> dict[str, Any]:
    """Return the figures of several replays, in the units of the reports."""
    figures = {
        "goodput_percent": over_seeds(100 * each.goodput for each in measured),
        "oracle_percent": over_seeds(100 * o if (o := each.oracle_goodput) else None for each in measured),
        "share_of_oracle_percent": over_seeds(100 * s if (s := each.share_of_oracle) else None for each in measured),
        "share_of_ideal_percent": over_seeds(100 * each.share_of_ideal for each in measured),
        "ettr_percent": over_seeds(100 * each.ettr for each in measured),
        "wall_days": over_seeds(each.wall / DAY for each in measured),
        "stops": over_seeds(float(each.stops) for each in measured),
        "in_place": over_seeds(float(each.in_place) for each in measured),
        "fell_back": over_seeds(float(each.fell_back) for each in measured),
        "hardware_stop_minutes": over_seeds(s / 60 if (s := each.hardware_stop) else None for each in measured),
        "in_place_minutes": over_seeds(s / 60 if (s := each.in_place_stop) else None for each in measured),
        "divergence_hours": over_seeds(s / 3600 if (s := each.divergence) else None for each in measured),
        "person_hours": over_seeds(each.person / 3600 for each in measured),
        "human_calls": over_seeds(float(len(each.pages)) for each in measured),
        "longest_hands_off_days": over_seeds(each.longest_hands_off / DAY for each in measured),
    }
    ends: dict[str, int] = {}
    for each in measured:
        ends[each.status] = ends.get(each.status, 0) + 1
    days = [each.longest_hands_off / DAY for each in measured if each.wall >= HANDS_OFF_DAYS * DAY]
    return {
        "seeds": len(measured),
        **{name: None if each is None else _plain(each) for name, each in figures.items()},
        "hands_off_14_days_percent": 100 * mean(each >= HANDS_OFF_DAYS for each in days) if days else None,
        "ends": ends,
    }


def _plain(found: SeedStatistics) -> dict[str, float]:
    values = {"mean": found.mean, "sd": found.sd, "least": found.least, "most": found.most}
    return {name: round(value, 4) for name, value in values.items() if math.isfinite(value)}


def lost_by_cause(measured: Sequence[ReplayResult]) -> dict[str, float]:
    """Return mean lost hours by cause, the most first."""
    causes = {cause for each in measured for cause in each.lost}
    hours = {cause: mean(each.lost.get(cause, 0.0) for each in measured) / 3600 for cause in causes}
    return dict(sorted(hours.items(), key=lambda pair: -pair[1]))


@dataclass(frozen=True, slots=True)
class Variation:
    """A scenario with one value changed."""

    what: str
    value: float
    scenario: Scenario
    tick_seconds: float = 1.0


def variations(scenario: Scenario) -> list[Variation]:
    """Return the variations that the scenario names."""
    return [_varied(scenario, what, value) for what, values in scenario.vary.items() for value in values]


def _varied(scenario: Scenario, what: str, value: float) -> Variation:
    saves = "in_place" if scenario.in_place else "training"
    table = {"spares": "cluster", "save_every": saves}.get(what)
    if table is None:
        return Variation(what, value, scenario, tick_seconds=value)
    changed = getattr(scenario, table).model_copy(update={what: int(value)})
    return Variation(what, value, scenario.model_copy(update={table: changed}))
