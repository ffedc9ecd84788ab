"""The goals of the replay over many seeds: goodput on published records, compared with an oracle.

    python benchmarks/replay.py --record incidents-opt175b.csv --seeds 20 --jobs 2 --save replay.jsonl

The clusters are simulated, the supervisor is the real one. Every finished replay is a line in the file of `--save`, and
is not run again: the benchmark can be stopped and continued. It prints the tables as Markdown, reached goals or not.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from opt_ops.laboratory.replay import scenario, trace
from opt_ops.laboratory.replay.fault_plan import sample
from opt_ops.laboratory.replay.measure import DAY, measure
from opt_ops.laboratory.replay.play import play
from opt_ops.laboratory.replay.sweep import HANDS_OFF_DAYS

GOALS = (
    # scenario, what, goal, the least, in percent
    ("opt-175b", "goodput", 98.0, 97.0),
    ("opt-175b", "share_of_oracle", 99.5, 99.0),
    ("opt-175b", "hands_off", 97.0, 90.0),
    ("llama-3", "goodput", 97.4, 96.0),
    ("llama-3", "share_of_oracle", 99.5, 99.0),
)
WHAT = {
    "goodput": "goodput, %",
    "share_of_oracle": "share of the oracle, %",
    "hands_off": "replays with ≥ 14 days without an operator, %",
}
HEADINGS = (
    "scenario",
    "seeds",
    "goodput %",
    "oracle %",
    "share of oracle %",
    "share of ideal %",
    "hardware stop, min",
    "divergence, h",
    "waiting for an operator, h",
    "pages",
    "≥ 14 d hands-off",
    "ends",
    "CPU s",
)


def one(name: str, record: Path | None, seed: int, days: float | None) -> dict[str, Any]:
    """Run one replay. Returns a line of the file. `days`: days of work, if not those of the scenario."""
    began, began_wall = time.process_time(), time.monotonic()
    chosen = scenario.load(name)
    if days is not None:
        steps = int(days * DAY / chosen.training.step_seconds.value)
        chosen = chosen.model_copy(update={"training": chosen.training.model_copy(update={"steps": steps})})
    known = trace.read(record, chosen.trace) if record is not None and chosen.trace.kinds else None
    fault_plan = sample(chosen, known, seed)
    found = measure(chosen, fault_plan, play(chosen, fault_plan)).plain()
    kinds: dict[str, int] = {}
    for incident in found.pop("incidents"):
        kinds[incident["kind"]] = kinds.get(incident["kind"], 0) + 1
    spent = {"cpu_seconds": time.process_time() - began, "real_seconds": time.monotonic() - began_wall}
    return {"scenario": name, "days": days, **spent, "incidents": kinds, **found}


def run(
    names: list[str], record: Path | None, seeds: range, jobs: int, save: Path, days: float | None
) -> list[dict[str, Any]]:
    """Run the replays that are not in the file yet, and add them to it."""
    lines = [json.loads(line) for line in save.read_text().splitlines()] if save.exists() else []
    done = {(line["scenario"], line["seed"]) for line in lines}
    todo = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]
    # Millions of objects stay alive to the end: garbage collection took an eighth of the time.
    with ProcessPoolExecutor(jobs, initializer=gc.disable) as pool, save.open("a") as file:
        for future in as_completed([pool.submit(one, name, record, seed, days) for name, seed in todo]):
            lines.append(future.result())
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    return [line for line in lines if line["scenario"] in names]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the tables of the scenarios and of the goals."""
    names = list(dict.fromkeys(line["scenario"] for line in lines))
    rows = [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    for name in names:
        mine = [line for line in lines if line["scenario"] == name]
        ends: dict[str, int] = {}
        for line in mine:
            ends[line["status"]] = ends.get(line["status"], 0) + 1
        cells = [
            name,
            str(len(mine)),
            _spread([100 * line["goodput"] for line in mine]),
            _spread([100 * line["oracle_goodput"] for line in mine if line["oracle_goodput"]]),
            _spread([100 * line["share_of_oracle"] for line in mine if line["share_of_oracle"]], 3),
            _spread([100 * line["share_of_ideal"] for line in mine]),
            _spread([line["hardware_stop"] / 60 for line in mine if line["hardware_stop"]]),
            _spread([line["divergence"] / 3600 for line in mine if line["divergence"]]),
            _spread([line["person"] / 3600 for line in mine]),
            _spread([float(len(line["pages"])) for line in mine], 1),
            _hands_off(mine),
            ", ".join(f"{count} {status}" for status, count in ends.items()),
            f"{mean(line['cpu_seconds'] for line in mine):.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| goal | wanted | least | reached | |", "| --- | ---: | ---: | --- | --- |"]
    for name, what, goal, least in GOALS:
        mine = [line for line in lines if line["scenario"] == name]
        values = [100 * line[what] for line in mine if line.get(what)] if what != "hands_off" else _long_enough(mine)
        if not values:
            continue
        value = mean(values)
        verdict = "reached" if value >= goal else "the least is reached" if value >= least else "missed"
        shown = _spread(values, 3) if what != "hands_off" else _hands_off(mine)
        rows.append(f"| {name}: {WHAT[what]} | {goal} | {least} | {shown} | {verdict} |")
    broken = [line for line in lines if line["scenario"] == "broken-recipe"]
    if broken:
        paged = sum(line["status"] == "HALTED" and len(line["pages"]) > 0 for line in broken)
        rows.append(f"| broken-recipe: ends HALTED, with a page | all | all | {paged} of {len(broken)} | |")
    return "\n".join(rows)


def lost(lines: list[dict[str, Any]]) -> str:
    """Return a table of mean lost hours by cause."""
    causes = {cause for line in lines for cause in line["lost"]}
    hours = {cause: sum(line["lost"].get(cause, 0.0) for line in lines) / len(lines) / 3600 for cause in causes}
    most = sorted(hours.items(), key=lambda pair: -pair[1])[:16]
    return "\n".join(
        ["| hours | lost to |", "| ---: | --- |", *(f"| {value:.2f} | {cause} |" for cause, value in most)]
    )


def _long_enough(lines: list[dict[str, Any]]) -> list[float]:
    """Return 100 or 0 for each replay of at least 14 days: whether it ran 14 days without an operator."""
    least = HANDS_OFF_DAYS * DAY
    return [100.0 * (line["longest_hands_off"] >= least) for line in lines if line["wall"] >= least]


def _hands_off(lines: list[dict[str, Any]]) -> str:
    """Format the share with its standard error, which is large for a few replays."""
    found = _long_enough(lines)
    if not found:
        return "-"
    share = mean(found) / 100
    return f"{100 * share:.0f} % of {len(found)} (± {100 * (share * (1 - share) / len(found)) ** 0.5:.1f})"


def _spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return "-"
    sd = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {sd:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Run the command: replay, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="incidents-opt175b.csv; without it, its rows are sampled")
    parser.add_argument("--first", type=int, default=1, metavar="SEED")
    parser.add_argument("--seeds", type=int, default=20, help="last seed")
    parser.add_argument("--days", type=float, help="days of work instead of those of each scenario")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--save", type=Path, default=Path("replay.jsonl"))
    parser.add_argument(
        "scenarios", nargs="*", default=["opt-175b", "llama-3", "quiet-week", "cluster-loss", "broken-recipe"]
    )
    given = parser.parse_args()
    lines = run(given.scenarios, given.record, range(given.first, given.seeds + 1), given.jobs, given.save, given.days)
    print(f"Simulated clusters, real supervisor. Python {platform.python_version()}, {platform.machine()}.\n")
    print(table(lines))
    for name in given.scenarios:
        print(f"\n{name}, mean of its replays:\n")
        print(lost([line for line in lines if line["scenario"] == name]))


if __name__ == "__main__":
    main()
