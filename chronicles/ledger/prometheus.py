"""The ledger for Prometheus: one text file for node_exporter's textfile collector, every lineage with its label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from chronicles.ledger.summary import LedgerSummary, Restarts

# Name, help, value. All are gauges: a ledger is computed again each time, and may fall when steps are discarded.
_NUMBERS: tuple[tuple[str, str, Callable[[LedgerSummary], float | None]], ...] = (
    ("goodput_ratio", "Kept steps × healthy step time ÷ wall clock.", lambda s: s.goodput),
    ("share_of_ideal_ratio", "Kept steps × ideal step time ÷ wall clock.", lambda s: s.share_of_ideal),
    ("ettr_ratio", "Time in kept updates ÷ wall clock.", lambda s: s.ettr),
    ("kept_steps", "Updates that are part of the present weights.", lambda s: s.kept_steps),
    ("repeated_steps", "Updates that were discarded.", lambda s: s.steps_discarded),
    ("healthy_step_seconds", "Usual step, evaluation included, saves not.", lambda s: s.healthy_step_seconds),
    ("wall_seconds", "From the request to the end or the newest report.", lambda s: s.wall_seconds),
    ("failures", "Incidents that stopped training; no drills.", lambda s: s.reliability.failures),
    ("mtbf_seconds", "Time in updates ÷ failures.", lambda s: s.reliability.mtbf_seconds),
    ("mttr_seconds", "Mean downtime of a recovery.", lambda s: s.reliability.mttr_seconds),
    ("recoveries_in_place", "Recoveries of lost ranks alone.", lambda s: s.reliability.recoveries_in_place),
    ("requeues", "Submissions to the scheduler after the first.", lambda s: s.restarts.requeues),
    ("calls", "Pages to on-call, halts included.", lambda s: s.involvement.pages),
    ("longest_hands_off_seconds", "Longest time between two pages.", lambda s: s.involvement.longest_hands_off_seconds),
    ("node_hours", "Nodes held × hours, spares included.", lambda s: s.resources.node_hours),
    ("node_hours_lost", "Node-hours outside kept updates.", lambda s: s.resources.node_hours_lost),
    ("energy_kwh", "Energy by the GPUs' counters × PUE.", lambda s: s.resources.kwh),
    ("emissions_tco2e", "Energy × the grid's factor.", lambda s: s.resources.tco2e),
    ("cost", "By the site's rates.", lambda s: s.resources.cost),
)
_ORIGINS: tuple[tuple[str, Callable[[Restarts], int]], ...] = (
    ("automatic", lambda restarts: restarts.automatic),
    ("manual", lambda restarts: restarts.manual),
    ("planned", lambda restarts: restarts.planned),
)

_Sample = tuple[Mapping[str, str], float]


def text(summaries: Mapping[str, LedgerSummary]) -> str:
    """The file, in Prometheus' text format 0.0.4. `summaries` are by lineage; unknown values are skipped."""
    lines: list[str] = []
    for name, meaning, of in _NUMBERS:
        found = {lineage: of(summary) for lineage, summary in summaries.items()}
        lines += _metric(name, meaning, [({"lineage": n}, value) for n, value in found.items() if value is not None])
    lines += _metric("restarts", "Launches after the first.", [*_restarts(summaries)])
    lines += _metric("phase_seconds", "The wall clock, divided into phases.", [*_phases(summaries)])
    lines += _metric("lost_seconds", "Time outside kept updates.", [*_lost(summaries)])
    return "".join(f"{line}\n" for line in lines)


def _restarts(summaries: Mapping[str, LedgerSummary]) -> Iterator[_Sample]:
    for lineage, summary in summaries.items():
        for way, of in _ORIGINS:
            yield {"lineage": lineage, "way": way}, of(summary.restarts)


def _phases(summaries: Mapping[str, LedgerSummary]) -> Iterator[_Sample]:
    for lineage, summary in summaries.items():
        for phase, seconds in summary.seconds_by_phase.items():
            yield {"lineage": lineage, "phase": str(phase)}, seconds


def _lost(summaries: Mapping[str, LedgerSummary]) -> Iterator[_Sample]:
    for lineage, summary in summaries.items():
        for lost in summary.lost_by_kind:
            for stage, seconds in lost.seconds_by_stage.items():
                if seconds:
                    yield {"lineage": lineage, "cause": lost.kind, "stage": str(stage)}, seconds


def _metric(name: str, meaning: str, samples: list[_Sample]) -> list[str]:
    if not samples:
        return []
    rows = [f"opt_ops_{name}{{{_labels(labels)}}} {float(value)!r}" for labels, value in samples]
    return [f"# HELP opt_ops_{name} {meaning}", f"# TYPE opt_ops_{name} gauge", *rows]


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
