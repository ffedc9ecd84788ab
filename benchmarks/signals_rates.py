"""Cases of the learning rate, and of fp16's loss scale."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from benchmarks.signals_curves import Look, Row, draw, healthy, noise_sd
from benchmarks.signals_rules import Case

# name: lines in which it is to be noticed
LEAVES = {
    "jumps up": 100,
    "jumps down": 100,
    "falls to nothing": 100,
    "stuck": 1500,
    "decays too early": 800,
    "warm-up again": 200,
    "grows slowly": 800,
    "jumps for 50 lines": 100,
}


def _left(kind: str, rng: random.Random) -> tuple[float, float]:
    factor = rng.choice((1.6, 2, 3, 10)) if "up" in kind or "for" in kind else rng.choice((0.1, 0.3, 0.6))
    return factor, rng.uniform(1.8, 4)


def off_schedule(count: int, rng: random.Random) -> list[Case]:
    """The learning rate leaves its schedule; the loss follows by no more than some sd."""
    return [_off(list(LEAVES)[k % len(LEAVES)], random.Random(rng.random())) for k in range(count)]


def _off(kind: str, rng: random.Random) -> Case:
    look = draw(rng, noises=("global batch", "mini-batch"), every=rng.choice((1, 1, 10)))
    look = replace(look, lr=True, schedule="cosine" if kind == "stuck" else look.schedule)
    if kind == "stuck":  # it shows only where the schedule moves
        look = replace(look, start=look.horizon // 2)
    at, watched = rng.randrange(300, 2000), LEAVES[kind]
    rows = healthy(rng, look, at + watched)
    changed, sd = [row.copy() for row in rows], noise_sd(rows, at)
    factor, growth = _left(kind, rng)
    before = rows[at - 1].lr or look.peak
    for n, row in enumerate(changed[at:]):
        planned = row.lr or look.peak
        row.lr = _rate(kind, n, planned, before, factor, growth)
        change = math.log(max(1e-3, row.lr / planned))
        row.loss += sd * (0.8 * change if change > 0 else 0.2 * change) * min(1.0, n / 100)
    return Case(
        kind=kind,
        name=f"{look.schedule}, {look.noise} {look.sd:.3f}, every {look.every}",
        rows=changed,
        onset=rows[at - 1].step + 1,
        quiet=rows,
        harmed=rows[at - 1].step + 1,
    )


def _rate(kind: str, n: int, planned: float, before: float, factor: float, growth: float) -> float:
    match kind:
        case "stuck":
            return before
        case "falls to nothing":
            return 0.0
        case "decays too early":
            return planned * max(0.02, 1 - n / 400)
        case "warm-up again":
            return planned * min(1.0, (n + 1) / 150)
        case "grows slowly":
            return planned * (1 + (growth - 1) * n / 800)
        case "jumps for 50 lines":
            return planned * (factor if n < 50 else 1.0)
        case _:
            return planned * factor


# ---- the loss scale

FLOORS = {"2^-5": 2.0**-5, "2^-3": 2.0**-3, "1": 1.0}


def _scaled(rng: random.Random, points: int) -> tuple[Look, list[Row]]:
    look = replace(draw(rng, noises=("global batch", "mini-batch"), every=1), scale=True, norm=True, start=10_000)
    return look, healthy(rng, look, points)


def collapses(count: int, rng: random.Random) -> list[Case]:
    """Overflow after overflow, down to where the scaler stops, and never up again. The loss stays as it was."""
    cases = []
    for k in range(count):
        own = random.Random(rng.random())
        floor = list(FLOORS)[k % len(FLOORS)]
        _, rows = _scaled(own, 1800)
        at, gap = own.randrange(300, 1200), own.choice((1, 1, 2, 5))
        changed = [row.copy() for row in rows]
        scale = rows[at - 1].scale or 65536.0
        for n, row in enumerate(changed[at:]):
            overflow = n % gap == 0
            row.scale, row.skip = scale, "overflow" if overflow else None
            row.gnorm = None if overflow else (row.gnorm or 0.5)
            if overflow:
                scale = max(FLOORS[floor], scale / 2)
        cases.append(
            Case(
                kind=f"stops at {floor}",
                name=f"an overflow every {gap} lines",
                rows=changed,
                onset=rows[at].step,
                quiet=rows,
                harmed=rows[at - 1].step + 1,
            )
        )
    return cases


def healthy_scales(count: int, rng: random.Random) -> list[Case]:
    """What scales of healthy runs do."""
    kinds = ("overflow every thousand steps", "searches from 2^32", "deep dip that recovers", "hovers above its floor")
    cases = []
    for k in range(count):
        own, kind = random.Random(rng.random()), kinds[k % len(kinds)]
        _, rows = _scaled(own, 4000)
        at = 0 if "searches" in kind else own.randrange(300, 1500)
        if kind == "searches from 2^32":
            for n, row in enumerate(rows[:17]):
                row.scale, row.skip, row.gnorm = 2.0 ** (32 - n), "overflow", None
        elif kind != kinds[0]:
            low, back = (own.choice((5, 8)), 60) if kind == "deep dip that recovers" else (own.choice((1, 2)), 100)
            for n, row in enumerate(rows[at:]):
                fell = n < 16 - low
                up = low + (n - (16 - low)) // back if kind == "deep dip that recovers" else low + (n // back) % 2
                row.scale = 2.0 ** (16 - n if fell else min(16, up))
                over = fell or ("hovers" in kind and n % (2 * back) == 0)
                row.skip, row.gnorm = ("overflow", None) if over else (None, row.gnorm or 0.5)
        cases.append(Case(kind=kind, name="", rows=rows, onset=rows[at].step))
    return cases
