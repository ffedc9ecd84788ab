"""Divergences drawn by seed after the shapes that public logbooks tell of. None is a copy of a real curve.

The shapes are those of the fp16 divergences of BigScience's 13B and 104B, BLOOM's spike (one that does not heal),
OPT-175B's repeated blow-ups, IDEFICS's slow drifts, and of what runs do while nobody watches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

from benchmarks.signals_curves import Look, Row, draw, healthy, level
from benchmarks.signals_events import Change, event
from benchmarks.signals_rules import Case

Shape = Callable[[random.Random, Look], Change]


def _norm(row: Row, factor: float) -> None:
    if row.gnorm is not None:
        row.gnorm *= factor


def _fp16(rng: random.Random, look: Look) -> Change:
    """Up to 7 to 10 nats within a few lines; the norm stands still while updates are skipped, the scale halves."""
    jump, top, back = rng.choice((1, 2, 5)), rng.uniform(4, 8), rng.uniform(40, 300)
    held: list[float] = []

    def change(n: int, row: Row) -> None:
        row.loss += top * min(1.0, (n + 1) / jump) * (0.35 + 0.65 * math.exp(-n / back))
        held.append(row.gnorm or 0.0)
        row.gnorm = None if row.gnorm is None else held[0] * (1 if n < 5 else 2)
        if row.scale is not None:
            row.scale, row.skip = max(1.0, 2.0 ** (16 - n)), None

    return change


def _turn_early(rng: random.Random, look: Look) -> Change:
    """6.4, 6.6, 7.3, 9.1, 10.2: a turn for the worse, each line twice as far up."""
    doubling, top = rng.uniform(1, 6), rng.uniform(1.5, 5)

    def change(n: int, row: Row) -> None:
        row.loss += min(top, 2 * look.sd * 2 ** (n / doubling))
        _norm(row, 1 + min(3.0, n / 3))

    return change


def _bloom(rng: random.Random, look: Look) -> Change:
    """The norm leads by some lines, then a peak of 3 nats; half a nat or more of it stays."""
    lead, peak, stays, half = rng.randrange(2, 8), rng.uniform(1, 4), rng.uniform(0.3, 1.2), rng.uniform(3, 15)

    def change(n: int, row: Row) -> None:
        _norm(row, 4.0 ** min(n + 1, 5) if n < lead + 20 else rng.uniform(1, 4))
        if n >= lead:
            row.loss += stays + peak * 0.5 ** ((n - lead) / half)

    return change


def _again(rng: random.Random, look: Look) -> Change:
    """A spike every 60 to 250 lines; each heals most of its way and leaves the level higher."""
    period, left, top = rng.randrange(60, 250), rng.uniform(3, 8) * look.sd, rng.uniform(0.5, 2)

    def change(n: int, row: Row) -> None:
        times, since = n // period + 1, n % period
        row.loss += times * left * 0.7 + top * 0.5 ** (since / 8)
        _norm(row, 1 + 10 * 0.5 ** (since / 5))

    return change


def _slow_then_up(rng: random.Random, look: Look) -> Change:
    """0.02 to 0.05 nats within 250 steps, for some hundred more, and then away."""
    drift, wait = max(rng.uniform(0.02, 0.05), 2.5 * look.sd), rng.randrange(200, 600)

    def change(n: int, row: Row) -> None:
        row.loss += drift * min(1.0, n / 250) + (
            0.0 if n < 250 + wait else min(4.0, 0.01 * 2 ** ((n - 250 - wait) / 30))
        )

    return change


def _norm_led(rng: random.Random, look: Look) -> Change:
    """The norm goes up to 2 to 10 times and stays; the loss is two sd higher."""
    up, within, rise = rng.uniform(2, 10), rng.randrange(1, 200), 2 * look.sd

    def change(n: int, row: Row) -> None:
        part = min(1.0, (n + 1) / within)
        _norm(row, 1 + (up - 1) * part)
        row.loss += rise * part

    return change


def _slow_turn(rng: random.Random, look: Look) -> Change:
    """A minimum, and from there up like a parabola, for thousands of steps."""
    height = max(rng.uniform(0.3, 1.0), 8 * look.sd)

    def change(n: int, row: Row) -> None:
        row.loss += height * (n / 3000) ** 2
        _norm(row, 1 + n / 3000)

    return change


def _stuck(rng: random.Random, look: Look) -> Change:
    """A blow-up, and then the loss of a model that knows no more than how often words come."""
    end, within = rng.choice((10.8, 7.6, 6.9)), rng.randrange(2, 60)

    def change(n: int, row: Row) -> None:
        part = min(1.0, (n + 1) / within)
        row.loss += (end - row.loss) * part + (0.3 * math.exp(-n / 50) if part == 1 else 0.0) + rng.gauss(0, 0.01)
        _norm(row, 1 + 30 * math.exp(-n / 20) if n < 60 else 0.05)

    return change


def _dead(rng: random.Random, look: Look) -> Change:
    """The very same number in each line."""
    value = rng.choice((math.log(50272), math.log(32000), 11.76))

    def change(n: int, row: Row) -> None:
        row.loss = value
        row.gnorm = None if row.gnorm is None else 0.0

    return change


def _nan_tail(rng: random.Random, look: Look) -> Change:
    """Some lines of a rise, or none, and then nothing finite."""
    before, growth = rng.choice((0, 0, 3, 12)), rng.uniform(1.3, 3)

    def change(n: int, row: Row) -> None:
        row.loss = math.nan if n >= before else row.loss + look.sd * growth**n
        if n >= before and row.gnorm is not None:
            row.gnorm = math.inf
        else:
            _norm(row, growth**n)

    return change


def _first_lines(rng: random.Random, look: Look) -> Change:
    """Within the first 50 lines of a run the fall ends, and the loss goes back up, as far as it began or less."""
    top, within = rng.uniform(1.5, 4), rng.randrange(5, 60)

    def change(n: int, row: Row) -> None:
        row.loss += top * min(1.0, (n + 1) / within)
        _norm(row, 1 + 4 * min(1.0, (n + 1) / within))

    return change


def _worse_and_wilder(rng: random.Random, look: Look) -> Change:
    """Too high a learning rate: level and noise rise together, over hundreds of lines."""
    height, wild, within = rng.uniform(4, 10) * look.sd, rng.uniform(1, 3) * look.sd, rng.randrange(100, 600)

    def change(n: int, row: Row) -> None:
        part = min(1.0, n / within)
        row.loss += part * (height + rng.gauss(0, wild))
        _norm(row, 1 + part * rng.uniform(0.5, 2))

    return change


# name: shape, lines before the onset, lines watched, what the run looks like
SHAPES: dict[str, tuple[Shape, tuple[int, int], int, dict[str, object]]] = {
    "fp16 blow-up": (_fp16, (300, 2500), 300, {"scale": True, "norm": True}),
    "turn in the warm-up": (_turn_early, (60, 600), 150, {"every": 10, "warmup": 5000, "start": 0, "pace": 60.0}),
    "spike like BLOOM's that stays": (_bloom, (300, 2500), 400, {"norm": True}),
    "blow-ups again and again": (_again, (300, 2500), 900, {}),
    "drift of 0.02 to 0.05 nats, then up": (_slow_then_up, (600, 2500), 1200, {"every": 1, "start": 40_000}),
    "norm up for good, loss up 2 sd": (_norm_led, (300, 2500), 1500, {"norm": True}),
    "slow turn over thousands of steps": (_slow_turn, (800, 3000), 3000, {"every": 1}),
    "stuck after a blow-up": (_stuck, (300, 2500), 300, {}),
    "dead constant": (_dead, (100, 2500), 300, {}),
    "not finite to the end": (_nan_tail, (30, 2500), 200, {}),
    "within the first 50 lines": (_first_lines, (20, 50), 400, {"start": 0, "warmup": 500, "pace": 40.0}),
    "sparse log": (_turn_early, (30, 250), 120, {"every": 100}),
    "level and noise rise": (_worse_and_wilder, (300, 2500), 1200, {}),
}


SLOW = (
    "drift of 0.02 to 0.05 nats, then up",
    "norm up for good, loss up 2 sd",
    "slow turn over thousands of steps",
    "level and noise rise",
)
"""Shapes that a loss which still falls would hide."""


def _late(look: Look, at: int, watched: int) -> Look:
    """The same run, so late that its loss falls by less than one sd while it is watched."""
    look = replace(look, start=max(look.start, 10_000), horizon=10**9)
    while level(look, look.start + at * look.every) - level(look, look.start + (at + watched) * look.every) > look.sd:
        look = replace(look, start=2 * look.start)
    return look


def divergences(count: int, rng: random.Random) -> list[Case]:
    """`count` of them, the shapes in turn."""
    names = list(SHAPES)
    return [_case(names[k % len(names)], random.Random(rng.random())) for k in range(count)]


def _case(name: str, rng: random.Random) -> Case:
    shape, (low, high), watched, fixed = SHAPES[name]
    noises = ("global batch", "global batch", "mini-batch", "outliers", "correlated")
    look = replace(draw(rng, noises=noises[:2] if "0.02" in name else noises), habits=(), **fixed)  # type: ignore[arg-type]
    if look.noise == "global batch" and "0.02" in name:
        look = replace(look, sd=rng.uniform(0.006, 0.015))
    if name == "sparse log":
        look = replace(look, every=rng.choice((50, 100, 200)))
    at = rng.randrange(low, high)
    if name in SLOW:
        look = _late(look, at, watched)
    rows = healthy(rng, look, at + watched)
    about = f"{look.noise} {look.sd:.3f}, every {look.every}, from {look.start}, line {at}"
    return event(name, about, rows, at, shape(rng, look), watched, rng)
