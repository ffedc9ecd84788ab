"""The judge of the detectors of loss and gradient norm, beside published rules.

    python -m benchmarks.signals --series FOLDER [--seed 1] [--size small|full] [--only SECTION]
        [--ours] [--misses] [--check] [-o json] [--plot docs/images/signals.svg]

FOLDER holds CSV files with the columns step, loss and optionally grad_norm, lr and attempt (docs/signals.md names those
that the published table was made with). Everything else is drawn by seed: healthy curves, divergences, faults, spikes
that heal, planned changes, resumes. An alarm of a published rule counts as a rollback: that is what it would cost to
trust it with one. With --check, the exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.signals_curves import Rows, read, to_points
from benchmarks.signals_forms import forms_section
from benchmarks.signals_judge import SECTIONS, Figure, Run, Tally, speed
from benchmarks.signals_rules import ALERTS_ONLY, OURS, PUBLISHED, ours

SIZES = {"small": 0.25, "full": 1.0}
ALL = (*SECTIONS, "forms")
OTHER_LOSS = {"image_model_outlier_then_new_loss": 15_999}
"""Curves of which only the beginning is healthy: from that step on, the loss is defined otherwise."""


def series(folder: Path) -> tuple[dict[str, Rows], dict[str, tuple[Rows, list[str]]]]:
    """The healthy curves of a folder, and those that were resumed (steps go back; column `attempt`)."""
    plain, resumed = {}, {}
    for path in sorted(folder.glob("*.csv")):
        with path.open() as file:
            header = file.readline()
        if "run" in header.split(","):  # excerpts
            continue
        rows, attempts = read(path)
        if any(b.step <= a.step for a, b in pairwise(rows)):
            resumed[path.stem] = rows, attempts
        else:
            plain[path.stem] = [row for row in rows if row.step < OTHER_LOSS.get(path.stem, row.step + 1)]
    return plain, resumed


def measure(run: Run, only: Iterable[str]) -> list[Figure]:
    """The figures of those sections, in order; progress goes to stderr."""
    tally, figures = Tally(run), []
    for name in only:
        begin = perf_counter()
        figures += list(forms_section(run)) if name == "forms" else list(SECTIONS[name](run, tally))
        print(f"{name}: {perf_counter() - begin:.0f} s", file=sys.stderr)
    if tally.inside.tried:
        figures += [tally.inside, tally.strict]
    return figures


def _cell(figure: Figure, rule: str) -> str:
    if rule not in figure.counts or (rule in ALERTS_ONLY and not figure.name.startswith("alerts")):
        return "–"
    count = figure.counts[rule]
    delay = f" ({median(figure.delays[rule]):.0f})" if figure.delays.get(rule) else ""
    return f"{count:.1f}" if figure.unit else f"{count:.0f}/{figure.tried}{delay}"


def table(figures: list[Figure], rules: tuple[str, ...]) -> str:
    """Markdown. In brackets: the median of the lines from the onset to the finding."""
    rows = [
        ["figure", "goal", *(f"**{r}**" if r == OURS else r for r in rules)],
        ["---", *("---:" for _ in (0, *rules))],
    ]
    for figure in figures:
        cells = [_cell(figure, rule) for rule in rules]
        rows.append([figure.name, figure.goal, cells[0] if figure.met else f"{cells[0]} ✗", *cells[1:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_json(run: Run, figures: list[Figure]) -> str:
    """All figures, with what came out wrong."""
    items = [
        {
            "figure": f.name,
            "goal": f.goal,
            "met": f.met,
            "tried": f.tried,
            "counts": f.counts,
            "median_delay": {rule: median(lines) for rule, lines in f.delays.items()},
            "kinds": f.kinds,
            "misses": f.misses,
        }
        for f in figures
    ]
    return json.dumps({"schema": "opt-ops/signals-judge/1", "seed": run.seed, "figures": items}, indent=1)


def plot(curves: dict[str, Rows], path: Path) -> None:
    """Each curve with what opt-ops found."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "signals"
    figure, axes = plt.subplots(len(curves), 1, figsize=(7, 2 * len(curves)), layout="constrained", squeeze=False)
    for axis, (name, curve) in zip(axes[:, 0], curves.items(), strict=True):
        shown = curve[:: max(1, len(curve) // 1500)]
        axis.plot([p.step for p in shown], [p.loss for p in shown], lw=0.6, color="0.3")
        for found in ours(to_points(curve)):
            axis.axvline(found.step, color="tab:red" if found.rolls_back else "tab:orange", lw=0.8, alpha=0.7)
        axis.set(title=name, ylabel="loss, nats", ylim=(min(p.loss for p in curve) - 0.2, 6))
        axis.title.set_fontsize(8)
    axes[-1, 0].set_xlabel("step; orange: an operator is notified, red: rollback")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", action="append", choices=ALL, help="may be repeated")
    parser.add_argument("--ours", action="store_true", help="leave out the published rules")
    parser.add_argument("--misses", action="store_true", help="list what came out wrong")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a goal is missed")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    plain, resumed = series(arguments.series)
    if not plain:
        parser.error(f"{arguments.series} holds no CSV file with step and loss")
    rules = (OURS,) if arguments.ours else (OURS, *PUBLISHED)
    run = Run(plain, resumed, arguments.seed, SIZES[arguments.size], rules)
    figures = measure(run, arguments.only or ALL)
    if arguments.output == "json":
        print(as_json(run, figures))
    else:
        print(table(figures, rules))
        print(f"\nOne line costs opt-ops {speed(run):.1f} µs.")
        if arguments.misses:
            for figure in figures:
                kinds = [
                    f"- {kind}: {wrong} of {tried} wrong" for kind, (wrong, tried) in figure.kinds.items() if wrong
                ]
                print(f"\n{figure.name}: {len(figure.misses)}", *kinds, sep="\n")
                print(*(f"  - {miss}" for miss in figure.misses), sep="\n")
    if arguments.plot:
        plot({name: rows for name, rows in plain.items() if len(rows) > 3000}, arguments.plot)
    return 1 if arguments.check and not all(figure.met for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
