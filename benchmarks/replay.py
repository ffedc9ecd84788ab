"""The goals of the replay over many seeds: goodput on published records, compared with an oracle.

    python -m benchmarks.replay --record incidents-opt175b.csv --seeds 20 --jobs 2 --save replay.jsonl

The clusters are simulated, the supervisor is the real one. Scenarios with a table `[in_place]` are replayed both ways,
with recovery in place and with restarts alone. Every finished replay is a line in the file of `--save`, and is not run
again: the benchmark can be stopped and continued. It prints the tables as Markdown, reached goals or not.
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
    # scenario, recovery, what, goal, the least that is accepted (in percent, or minutes)
    ("opt-175b", "in-place", "goodput", 98.6, 98.0),
    ("opt-175b", "in-place", "hardware_minutes", 0.6, 0.7),
    ("opt-175b", "in-place", "share_of_oracle", 99.5, 99.0),
    ("opt-175b", "in-place", "hands_off", 97.0, 90.0),
    ("llama-3", "in-place", "goodput", 99.2, 98.6),
    ("llama-3", "in-place", "hardware_minutes", 0.6, 0.8),
    ("llama-3", "in-place", "share_of_oracle", 99.5, 99.0),
    ("opt-175b", "restart", "goodput", 98.0, 97.0),
    ("opt-175b", "restart", "share_of_oracle", 99.5, 99.0),
    ("opt-175b", "restart", "hands_off", 97.0, 90.0),
    ("llama-3", "restart", "goodput", 97.4, 96.0),
    ("llama-3", "restart", "share_of_oracle", 99.5, 99.0),
)
WHAT = {
    "goodput": "goodput, %",
    "hardware_minutes": "lost per hardware stop, min",
    "share_of_oracle": "share of the oracle, %",
    "hands_off": "replays with ≥ 14 days without an operator, %",
}
HEADINGS = (
    "scenario",
    "recovery",
    "seeds",
    "goodput %",
    "oracle %",
    "share of oracle %",
    "share of ideal %",
    "hardware stop, min",
    "of it in place, min",
    "divergence, h",
    "waiting for an operator, h",
    "pages",
    "≥ 14 d hands-off",
    "ends",
    "CPU s",
)


def one(name: str, recovery: scenario.Recovery, record: Path | None, seed: int, days: float | None) -> dict[str, Any]:
    """Run one replay. Returns a line of the file. `days`: days of work, if not those of the scenario."""
    began, began_wall = time.process_time(), time.monotonic()
    chosen = scenario.load(name).by(recovery)
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
    return {"scenario": name, "recovery": recovery, "days": days, **spent, "incidents": kinds, **found}


def run(
    names: list[str],
    recoveries: list[scenario.Recovery],
    record: Path | None,
    seeds: range,
    jobs: int,
    save: Path,
    days: float | None,
) -> list[dict[str, Any]]:
    """Run the replays that are not in the file yet, and add them to it."""
    lines = [json.loads(line) for line in save.read_text().splitlines()] if save.exists() else []
    done = {(line["scenario"], line["recovery"], line["seed"]) for line in lines}
    wanted = [(name, how, seed) for seed in seeds for name in names for how in _possible(name, recoveries)]
    todo = [each for each in wanted if each not in done]
    # Millions of objects stay alive to the end: garbage collection took an eighth of the time.
    with ProcessPoolExecutor(jobs, initializer=gc.disable) as pool, save.open("a") as file:
        for future in as_completed([pool.submit(one, name, how, record, seed, days) for name, how, seed in todo]):
            lines.append(future.result())
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    return [line for line in lines if line["scenario"] in names and line["recovery"] in recoveries]


def _possible(name: str, recoveries: list[scenario.Recovery]) -> list[scenario.Recovery]:
    """The kinds of recovery that a scenario has."""
    return [how for how in recoveries if how == "restart" or scenario.load(name).in_place is not None]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the tables of the scenarios and of the goals."""
    kinds = list(dict.fromkeys((line["scenario"], line["recovery"]) for line in lines))
    rows = [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    for name, recovery in kinds:
        mine = _of(lines, name, recovery)
        ends: dict[str, int] = {}
        for line in mine:
            ends[line["status"]] = ends.get(line["status"], 0) + 1
        cells = [
            name,
            recovery,
            str(len(mine)),
            _spread([100 * line["goodput"] for line in mine]),
            _spread([100 * line["oracle_goodput"] for line in mine if line["oracle_goodput"]]),
            _spread([100 * line["share_of_oracle"] for line in mine if line["share_of_oracle"]], 3),
            _spread([100 * line["share_of_ideal"] for line in mine]),
            _spread(_values(mine, "hardware_minutes")),
            _spread([line["in_place_stop"] / 60 for line in mine if line["in_place_stop"]]),
            _spread([line["divergence"] / 3600 for line in mine if line["divergence"]]),
            _spread([line["person"] / 3600 for line in mine]),
            _spread([float(len(line["pages"])) for line in mine], 1),
            _hands_off(mine),
            ", ".join(f"{count} {status}" for status, count in ends.items()),
            f"{mean(line['cpu_seconds'] for line in mine):.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| goal | wanted | least | reached | |", "| --- | ---: | ---: | --- | --- |"]
    for name, recovery, what, goal, least in GOALS:
        mine = _of(lines, name, recovery)
        if not (values := _values(mine, what)):
            continue
        sign = 1.0 if goal >= least else -1.0  # of times, the shorter is the better
        value = sign * mean(values)
        verdict = "reached" if value >= sign * goal else "the least is reached" if value >= sign * least else "missed"
        shown = _spread(values, 3) if what != "hands_off" else _hands_off(mine)
        rows.append(f"| {name}, {recovery}: {WHAT[what]} | {goal} | {least} | {shown} | {verdict} |")
    broken = [line for line in lines if line["scenario"] == "broken-recipe"]
    if broken:
        paged = sum(line["status"] == "HALTED" and len(line["pages"]) > 0 for line in broken)
        rows.append(f"| broken-recipe: ends HALTED, with a page | all | all | {paged} of {len(broken)} | |")
    return "\n".join(rows)


def _of(lines: list[dict[str, Any]], name: str, recovery: str) -> list[dict[str, Any]]:
    return [line for line in lines if (line["scenario"], line["recovery"]) == (name, recovery)]


def _values(lines: list[dict[str, Any]], what: str) -> list[float]:
    match what:
        case "hands_off":
            return _long_enough(lines)
        case "hardware_minutes":
            return [line["hardware_stop"] / 60 for line in lines if line["hardware_stop"]]
        case _:
            return [100 * line[what] for line in lines if line.get(what)]


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
    parser.add_argument("--recovery", choices=["in-place", "restart"], help="the default: both")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--save", type=Path, default=Path("replay.jsonl"))
    parser.add_argument(
        "scenarios",
        nargs="*",
        default=["opt-175b", "llama-3", "bloom", "glm-130b", "quiet-week", "cluster-loss", "broken-recipe"],
    )
    given = parser.parse_args()
    recoveries = [given.recovery] if given.recovery else ["in-place", "restart"]
    seeds = range(given.first, given.seeds + 1)
    lines = run(given.scenarios, recoveries, given.record, seeds, given.jobs, given.save, given.days)
    print(f"Simulated clusters, real supervisor. Python {platform.python_version()}, {platform.machine()}.\n")
    print(table(lines))
    for name, recovery in dict.fromkeys((line["scenario"], line["recovery"]) for line in lines):
        print(f"\n{name}, {recovery}, mean of its replays:\n")
        print(lost(_of(lines, name, recovery)))


if __name__ == "__main__":
    main()
