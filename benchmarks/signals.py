"""Detectors and published rules, side by side, on real curves and on faults put into them.

    python -m benchmarks.signals --series FOLDER [--faults 20] [--seed 1] [--plot docs/images/signals.svg]

FOLDER holds CSV files with the columns step, loss and optionally grad_norm and lr (docs/signals.md names those that the
published table was made with). Each fault is put at a random place of a random curve; `act` and `hold` say whether a
rollback is right. An alarm of a published rule counts as a rollback: that is what it would cost to trust it with one.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.published_rules import Curve, Rule, foundry, metaseq, olmo, zclip
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.values import Tier


def point(step: int, loss: float, gnorm: float | None, lr: float = 1e-4) -> Point:
    """A telemetry line with nothing but what a curve has. Without a gradient norm it is a constant."""
    return Point(
        step=step,
        ts=float(step),
        loss=loss if math.isfinite(loss) else None,
        gnorm=1.0 if gnorm is None else gnorm,
        lr=lr,
        betas=(),
        weight_decay=0.0,
        clip_norm=1.0,
        step_seconds=1.0,
        tokens=step,
        wps=1.0,
        finite=math.isfinite(loss),
    )


def read(path: Path) -> Curve:
    """A curve from a CSV file."""
    with path.open(newline="") as lines:
        return [
            point(
                int(r["step"]),
                float(r["loss"]),
                float(g) if (g := r.get("grad_norm")) else None,
                float(r.get("lr") or 1e-4),
            )
            for r in csv.DictReader(lines)
        ]


# ---- the rules


def found(curve: Curve) -> Iterator[Finding]:
    """What opt-ops finds in loss and gradient norm."""
    detector = LossDetector(SpikeRule())
    for each in curve:
        yield from detector.observe(each)


def ours(curve: Curve, tier: Tier) -> Iterator[int]:
    """opt-ops: the steps of the findings of that tier; a page that only tells people is an alert."""
    yield from (f.step for f in found(curve) if (Tier.ALERT if f.signal == "loss_too_low" else f.tier) is tier)


RULES: dict[str, Rule] = {
    "opt-ops, act": lambda curve: ours(curve, Tier.ACT),
    "opt-ops, alert": lambda curve: ours(curve, Tier.ALERT),
    "OLMo-core, 6 sd of 128": olmo,
    "llm-foundry, 2 × mean": foundry,
    "metaseq, EWM × 1.25": metaseq,
    "ZClip, z > 2.5": zclip,
}


# ---- the faults


@dataclass(frozen=True)
class Fault:
    """What is added to the loss `n` points and `s` steps after the onset, in nats; `act`: a rollback is right."""

    name: str
    act: bool
    shape: Callable[[int, int], float]
    points: int = 500  # in which it must be seen


def _decay(height: float, half: float) -> Callable[[int, int], float]:
    return lambda _, s: height * 0.5 ** (s / half)


SLOW = ((100, 500), (500, 500), (2000, 1500))  # steps that a rise takes, points in which it must be seen
FAULTS = [
    *(Fault(f"step of {h} nats", True, lambda _n, _s, h=h: h) for h in (0.3, 0.5, 1.0, 3.0)),
    *(Fault(f"rise of 1 nat in {t} steps, stays", True, lambda _n, s, t=t: min(1.0, s / t), p) for t, p in SLOW),
    *(
        Fault(f"blow-up, doubles in {d} steps", True, lambda _n, s, d=d: min(8.0, 0.01 * 2 ** (s / d)))
        for d in (3, 20, 60)
    ),
    *(Fault(f"drift of {r} nats in 1000 steps", True, lambda _n, s, r=r: r * s / 1000, 1500) for r in (0.5, 1.5)),
    Fault("jump of 4, half of it stays", True, lambda _n, s: 2 + 2 * 0.5 ** (s / 20)),
    Fault("single points of 3 nats", False, lambda n, _s: 3.0 if n % 40 == 0 else 0.0),
    *(Fault(f"spike of 3, halves in {h} steps", False, _decay(3.0, h)) for h in (5, 15, 30)),
    Fault("plateau of 2, back in 40 steps", False, lambda _n, s: 2.0 if s < 40 else 0.0),
    Fault("sawtooth, back in 30 of 100 steps", False, lambda _n, s: 1.5 * max(0.0, 1 - (s % 100) / 30)),
]


SLOPES = (50, 200, 1000)  # steps
TOLD = [
    *(Fault(f"falls by {h} nats at once, stays", False, lambda _n, _s, h=h: -h) for h in (0.5, 1.0)),
    *(
        Fault(f"falls by 1 nat in {t} steps, stays", False, lambda _n, s, t=t: -min(1.0, s / t))
        for t in (50, 200, 1000)
    ),
    *(Fault(f"1 nat lower for {n} points", False, lambda n, _s, m=n: -1.0 if n < m else 0.0) for n in (8, 40, 150)),
]
"""Wrong or repeated data: people are to be told, and nothing is to be rolled back."""


def frozen(curve: Curve, at: int, points: int) -> Curve:
    """The curve up to place `at`, and its noise around the level that it had there from then on: a plateau."""
    losses = [p.loss or 0.0 for p in curve]

    def level(n: int) -> float:
        return median(losses[max(0, n - 64) : n + 64])

    levels = {n: level(n) for n in range(at - at % 16, at + points + 16, 16)}
    there = level(at)
    return curve[:at] + [
        replace(p, loss=p.loss - levels[n - n % 16] + there)
        for n, p in enumerate(curve[at : at + points], at)
        if p.loss is not None
    ]


def struck(curve: Curve, fault: Fault, at: int) -> Curve:
    """The curve around place `at`, with the fault from there on."""
    onset = curve[at].step
    before, after = curve[max(0, at - 1500) : at], curve[at : at + fault.points]
    return before + [
        replace(p, loss=p.loss + fault.shape(n, p.step - onset)) for n, p in enumerate(after) if p.loss is not None
    ]


# ---- the trial


@dataclass
class Score:
    """Of one rule and one fault."""

    seen: int = 0
    tried: int = 0
    delays: list[int] | None = None


def trial(curves: dict[str, Curve], fault: Fault, rule: Rule, faults: int, rng: random.Random) -> Score:
    """Put the fault at random places; an alarm that the untouched curve has too does not count."""
    score = Score(delays=[])
    names = sorted(curves)
    for _ in range(faults):
        curve = curves[rng.choice(names)]
        at = rng.randrange(300, len(curve) - fault.points)
        onset = curve[at].step
        quiet = Fault("none", False, lambda _n, _s: 0.0, fault.points)
        known = {s for s in rule(struck(curve, quiet, at)) if s >= onset}
        alarms = [s for s in rule(struck(curve, fault, at)) if s >= onset and s not in known]
        score.tried += 1
        if alarms:
            score.seen += 1
            assert score.delays is not None
            score.delays.append(alarms[0] - onset)
    return score


def told(curves: dict[str, Curve], signal: str, fault: Fault | None, faults: int, rng: random.Random) -> list[str]:
    """How often an alert of that name came, after how many steps; how often a page; how often a rollback, wrongly."""
    alerts, pages, rollbacks = [], 0, 0
    for _ in range(faults):
        curve = curves[rng.choice(sorted(curves))]
        if fault is not None:
            at = rng.randrange(600, len(curve) - fault.points)
            bad, quiet = struck(curve, fault, at), struck(curve, Fault("none", False, lambda _n, _s: 0.0), at)
        else:
            at = rng.randrange(600, int((len(curve) - 1000) / 2.3))
            bad, quiet = frozen(curve, at, int(1.3 * at) + 1000), curve[: int(2.3 * at) + 1000]
        known = {(f.signal, f.tier, f.step) for f in found(quiet)}
        new = [f for f in found(bad) if f.step >= curve[at].step and (f.signal, f.tier, f.step) not in known]
        alerts += [f.step - curve[at].step for f in new if f.signal == signal and f.tier is Tier.ALERT][:1]
        pages += any(f.signal == signal and f.tier is Tier.ACT for f in new)
        rollbacks += any(f.signal != signal and f.tier is Tier.ACT for f in new)
    delay = f" ({median(alerts):.0f})" if alerts else ""
    return [f"{len(alerts)}/{faults}{delay}", f"{pages}/{faults}", f"{rollbacks}/{faults}"]


def synthetic(rng: random.Random, kind: str, points: int = 20_000) -> Curve:
    """A healthy curve with a noise that real ones have."""
    every = 5 if kind == "every 5th step" else 1
    slow, high, curve = 0.0, False, []
    for n in range(points):
        step = n * every
        loss = 2.0 + 9.0 / (1 + step / 120) ** 0.7
        match kind:
            case "white 0.02":
                noise = rng.gauss(0, 0.02)
            case "one rank, 0.15":
                noise = rng.gauss(0, 0.15)
            case "heavy tails":
                noise = 0.03 * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 1 / 1.5))
            case "correlated":
                slow = 0.98 * slow + 0.2 * rng.gauss(0, 0.03)
                noise = slow + rng.gauss(0, 0.03)
            case "two sources":
                noise = rng.gauss(0, 0.04) + (0.8 if rng.random() < 0.15 else 0.0)
            case "two sources, 4 %":
                noise = rng.gauss(0, 0.04) + (0.8 if rng.random() < 0.04 else 0.0)
            case "two sources in blocks":
                high = rng.random() < (0.05 if not high else 0.9)
                noise = rng.gauss(0, 0.04) + (0.5 if high else 0.0)
            case "three sources":
                noise = rng.gauss(0, 0.05) + rng.choice((0.0, 0.0, 0.0, 0.4, 1.0))
            case "batch × ¼ at 8000":
                noise = rng.gauss(0, 0.03 if n < 8000 else 0.06)
            case "warm-up bump":
                noise = rng.gauss(0, 0.04) + 0.3 * math.exp(-(((n - 600) / 120) ** 2))
            case _:
                noise = rng.gauss(0, 0.05)
        curve.append(point(step, loss + noise, 0.3 * rng.lognormvariate(0, 0.15)))
    return curve


KINDS = (
    "white 0.02",
    "one rank, 0.15",
    "heavy tails",
    "correlated",
    "two sources",
    "two sources, 4 %",
    "two sources in blocks",
    "three sources",
    "batch × ¼ at 8000",
    "warm-up bump",
    "every 5th step",
)


def quiet_rows(curves: dict[str, list[Curve]]) -> Iterator[list[str]]:
    """Alarms of every rule on curves that were left alone; the last row per 100,000 steps."""
    steps, total = 0, [0] * len(RULES)
    for name, several in curves.items():
        here = sum(curve[-1].step - curve[0].step for curve in several)
        counts = [sum(1 for curve in several for _ in rule(curve)) for rule in RULES.values()]
        steps, total = steps + here, [a + b for a, b in zip(total, counts, strict=True)]
        yield [name, f"{here:,}", *map(str, counts)]
    yield ["**per 100,000 steps**", f"{steps:,}", *(f"{1e5 * count / steps:.1f}" for count in total)]


def table(heading: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Each curve with what opt-ops found."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "signals"
    figure, axes = plt.subplots(len(curves), 1, figsize=(7, 2 * len(curves)), layout="constrained", squeeze=False)
    for axis, (name, curve) in zip(axes[:, 0], curves.items(), strict=True):
        shown = curve[:: max(1, len(curve) // 1500)]
        axis.plot([p.step for p in shown], [p.loss for p in shown], lw=0.6, color="0.3")
        for tier, colour in ((Tier.ALERT, "tab:orange"), (Tier.ACT, "tab:red")):
            for step in ours(curve, tier):
                axis.axvline(step, color=colour, lw=0.8, alpha=0.7)
        axis.set(title=name, ylabel="loss, nats", ylim=(min(p.loss or 9 for p in curve) - 0.2, 6))
        axis.title.set_fontsize(8)
    axes[-1, 0].set_xlabel("step; orange: alert, red: act")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=20, help="places for each fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--synthetic", type=int, default=3, help="healthy synthetic curves of each kind")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    paths = sorted(arguments.series.glob("*.csv"))
    curves = {p.stem: curve for p in paths if "run" not in p.open().readline() and len(curve := read(p)) > 1000}
    if not curves:
        parser.error(f"{arguments.series} holds no CSV file with step, loss and more than 1000 lines")
    rng = random.Random(arguments.seed)
    made = {kind: [synthetic(rng, kind) for _ in range(arguments.synthetic)] for kind in KINDS}
    real = {name: [curve] for name, curve in curves.items()}
    print(table(["curve, untouched", "steps", *RULES], quiet_rows(real)), "\n", flush=True)
    print(table(["synthetic, healthy", "steps", *RULES], quiet_rows(made)), "\n", flush=True)
    heading = ["fault put in", "right", *(f"{name}: seen (delay)" for name in RULES)]
    rows, total = [], {name: [0, 0, 0, 0] for name in RULES}
    for fault in FAULTS:
        row = [fault.name, "act" if fault.act else "hold"]
        for name, rule in RULES.items():
            score = trial(curves, fault, rule, arguments.faults, random.Random(f"{arguments.seed} {fault.name}"))
            delay = f" ({median(score.delays):.0f})" if score.delays else ""
            row.append(f"{score.seen}/{score.tried}{delay}")
            total[name][0 if fault.act else 2] += score.seen
            total[name][1 if fault.act else 3] += score.tried
        rows.append(row)
    rows += [
        ["**all that call for a rollback**", "act", *(f"{s}/{n} = {s / n:.0%}" for s, n, _, _ in total.values())],
        ["**all that heal**", "hold", *(f"{s}/{n} = {s / n:.0%}" for _, _, s, n in total.values())],
    ]
    print(table(heading, rows), "\n", flush=True)
    rng = random.Random(f"{arguments.seed} told")
    rows = [[f.name, *told(curves, "loss_too_low", f, arguments.faults, rng)] for f in TOLD]
    rows.append(["no progress from there on", *told(curves, "loss_plateau", None, arguments.faults, rng)])
    print(table(["put in", "told (delay)", "page", "rolled back, wrongly"], rows))
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
