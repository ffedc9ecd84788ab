"""Reports on replays: rows of tables, and the plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.laboratory.replay.fault_plan import FaultPlan
from opt_ops.laboratory.replay.scenario import Scenario
from opt_ops.laboratory.replay.trace import IncidentTrace
from opt_ops.runfolder.files import write_text

_ROWS = (
    ("goodput, %", "goodput_percent", "goodput"),
    ("share of ideal, %", "share_of_ideal_percent", "share_of_ideal"),
    ("ETTR, %", "ettr_percent", None),
    ("share of the oracle, %", "share_of_oracle_percent", None),
    ("wall clock, days", "wall_days", None),
    ("stops", "stops", None),
    ("replacements in place", "in_place", None),
    ("replacements that fell back to a restart", "fell_back", None),
    ("lost per hardware stop, min", "hardware_stop_minutes", "stop_minutes"),
    ("lost per hardware stop recovered in place, min", "in_place_minutes", None),
    ("lost per divergence, h", "divergence_hours", None),
    ("waiting for an operator, h", "person_hours", None),
    ("pages", "human_calls", "human_calls"),
    ("longest time without an operator, days", "longest_hands_off_days", "longest_hands_off_days"),
    ("replays with 14 days without an operator, %", "hands_off_14_days_percent", None),
)


def beside_people(scenario: Scenario, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows that compare the supervisor, the oracle with the same faults, and the people of the record."""
    rows: list[dict[str, Any]] = []
    for what, key, people in _ROWS:
        value = figures[key]
        row = {
            "what": what,
            "supervisor": spread(value) if isinstance(value, Mapping) else number(value),
            "oracle": spread(figures["oracle_percent"]) if key == "goodput_percent" else "-",
            "people": number(getattr(scenario.people, people)) if people else "-",
        }
        rows.append(row)
    return rows


def spread(figure: Mapping[str, float] | None) -> str:
    """Format as `98.12 ± 0.30 [97.50, 98.60]`: mean, standard deviation, lowest, highest."""
    if figure is None:
        return "-"
    mean, sd, least, most = (number(figure[name]) for name in ("mean", "sd", "least", "most"))
    return f"{mean} ± {sd} [{least}, {most}]"


def number(value: float | None) -> str:
    """Format with at most two digits after the point."""
    return "-" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def remarks_on(record: IncidentTrace | None, fault_plan: FaultPlan, path: Path | None) -> list[str]:
    """Return lines on one replay: which rows of the record it uses, which it skips, and what the seed sampled."""
    if record is None or path is None:
        return ["no record: the seed samples every event from the distributions of the scenario"]
    lines = [f"{path.name}: {record.rows} rows, {len(record.incidents)} of them replayed"]
    lines += [f"  not replayed: {count} × {kind}" for kind, count in record.left_out.most_common()]
    lines += [f"  sampled by the seed: {count} × {what}" for what, count in fault_plan.sampled.items() if count]
    return lines


def plot(
    scenario: Scenario, figures: Mapping[str, Any], varied: Sequence[Mapping[str, Any]], lost: Mapping[str, float]
) -> str:
    """Return an SVG: goodput over each varied value, and the causes of lost hours."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["varied"] for row in varied))
    with mpl.rc_context({"svg.hashsalt": scenario.name, "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(1, len(names) + 1, figsize=(4 * (len(names) + 1), 3.4), layout="constrained")
        panels = list(axes) if names else [axes]
        for panel, name in zip(panels, names, strict=False):
            rows = [row for row in varied if row["varied"] == name]
            means = [row["figures"]["goodput_percent"]["mean"] for row in rows]
            errors = [row["figures"]["goodput_percent"]["sd"] for row in rows]
            panel.errorbar(range(len(rows)), means, errors, marker="o", capsize=3, label="supervisor")
            known = [row["figures"]["oracle_percent"] for row in rows]
            oracle = [each["mean"] if each else float("nan") for each in known]
            panel.plot(range(len(rows)), oracle, marker=".", linestyle="--", label="oracle")
            if scenario.people.goodput is not None:
                panel.axhline(scenario.people.goodput, color="grey", linewidth=1, label="people")
            panel.set_xticks(range(len(rows)), [number(row["value"]) for row in rows])
            panel.set_xlabel(_LABELS.get(name, name))
            panel.set_ylabel("goodput, %")
            panel.legend(frameon=False)
        causes = list(lost)[:10][::-1]
        panels[-1].barh(causes, [lost[cause] for cause in causes])
        panels[-1].set_xlabel(f"hours lost, mean of {figures['seeds']} replays")
        figure.suptitle(f"Simulated: {scenario.title}")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


_LABELS = {
    "spares": "spare nodes",
    "save_every": "steps between saves",
    "see_seconds": "detection delay, s",
}


def write_plot(path: Path, svg: str) -> None:
    """Write the plot, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, svg)
