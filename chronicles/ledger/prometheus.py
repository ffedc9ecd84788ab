"""The ledger for Prometheus: one text file for node_exporter's textfile collector, every lineage with its label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# name, help, field of the account. All are gauges: a ledger is drawn anew, and may fall when steps are taken back.
_NUMBERS = (
    ("goodput_ratio", "Kept steps × healthy step time ÷ wall clock.", "goodput"),
    ("share_of_ideal_ratio", "Kept steps × ideal step time ÷ wall clock.", "share_of_ideal"),
    ("ettr_ratio", "Time in kept updates ÷ wall clock.", "ettr"),
    ("kept_steps", "Updates that are part of the present weights.", "kept_steps"),
    ("repeated_steps", "Updates that were taken back.", "steps_repeated"),
    ("healthy_step_seconds", "Usual step, evaluation included, saves not.", "healthy_step_seconds"),
    ("wall_seconds", "From the request to the end or the newest sign.", "wall_seconds"),
    ("failures", "Incidents that ended an attempt; no drills.", "failures"),
    ("mtbf_seconds", "Time in updates ÷ failures.", "mtbf_seconds"),
    ("mttr_seconds", "Mean standstill of a recovery.", "mttr_seconds"),
    ("requeues", "Submissions to the scheduler after the first.", "requeues"),
    ("calls", "Times that a human was needed.", "calls"),
    ("longest_hands_off_seconds", "Longest time between two calls.", "longest_hands_off_seconds"),
    ("node_hours", "Nodes held × hours, spares included.", "node_hours"),
    ("node_hours_lost", "Node-hours outside kept updates.", "node_hours_lost"),
    ("energy_kwh", "Energy by the GPUs' counters × PUE.", "kwh"),
    ("emissions_tco2e", "Energy × the grid's factor.", "tco2e"),
    ("cost", "By the site's rates.", "cost"),
)
_WAYS = ("automatic", "manual", "planned")

Row = Mapping[str, Any]
Sample = tuple[Mapping[str, str], float]


def text(accounts: Mapping[str, Row]) -> str:
    """The file, in Prometheus' text format 0.0.4. `accounts` are by lineage; what is unknown is left out."""
    lines: list[str] = []
    for name, told, field in _NUMBERS:
        found = {lineage: row[field] for lineage, row in accounts.items()}
        lines += _metric(name, told, [({"lineage": n}, value) for n, value in found.items() if value is not None])
    lines += _metric("restarts", "Launches after the first.", [*_restarts(accounts)])
    lines += _metric("phase_seconds", "The wall clock, without rest.", [*_by(accounts, "seconds_by_phase", "phase")])
    lines += _metric("lost_seconds", "Time outside kept updates.", [*_lost(accounts)])
    return "".join(f"{line}\n" for line in lines)


def _restarts(accounts: Mapping[str, Row]) -> Iterator[Sample]:
    for lineage, row in accounts.items():
        for way in _WAYS:
            yield {"lineage": lineage, "way": way}, row[f"restarts_{way}"]


def _by(accounts: Mapping[str, Row], field: str, label: str) -> Iterator[Sample]:
    for lineage, row in accounts.items():
        for key, value in row[field].items():
            yield {"lineage": lineage, label: str(key)}, value


def _lost(accounts: Mapping[str, Row]) -> Iterator[Sample]:
    for lineage, row in accounts.items():
        for kind in row["lost_by_kind"]:
            for stage, seconds in kind["seconds_by_stage"].items():
                if seconds:
                    yield {"lineage": lineage, "cause": kind["kind"], "stage": str(stage)}, seconds


def _metric(name: str, told: str, samples: list[Sample]) -> list[str]:
    if not samples:
        return []
    rows = [f"opt_ops_{name}{{{_labels(labels)}}} {float(value)!r}" for labels, value in samples]
    return [f"# HELP opt_ops_{name} {told}", f"# TYPE opt_ops_{name} gauge", *rows]


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
