"""Curves that the judge of the detectors works on: real ones from files, and healthy ones drawn by seed.

A curve is a list of `Row`, which are copied and changed freely; `to_points` makes of them what the detectors take in.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from opt_ops.core.detect.point import Point


@dataclass(slots=True)
class Row:
    """One logged line. `loss` may be nan; `gnorm` is None where it is not known, and may be inf."""

    step: int
    loss: float
    gnorm: float | None = None
    lr: float | None = None
    scale: float | None = None
    batch: int | None = None
    tokens: int | None = None  # of the global batch
    stage: str | None = None
    skip: str | None = None

    def copy(self) -> Row:
        """Another row that may be changed."""
        return Row(
            self.step, self.loss, self.gnorm, self.lr, self.scale, self.batch, self.tokens, self.stage, self.skip
        )


Rows = list[Row]


def to_point(row: Row) -> Point:
    """As the trainer's telemetry would say it."""
    loss = row.loss if math.isfinite(row.loss) else None
    gnorm = row.gnorm if row.gnorm is not None and math.isfinite(row.gnorm) else None
    unknown = row.gnorm is None or row.skip is not None
    return Point(
        step=row.step,
        ts=float(row.step),
        loss=loss,
        gnorm=gnorm,
        lr=row.lr or 0.0,
        betas=(),
        weight_decay=0.0,
        clip_norm=1.0,
        step_seconds=1.0,
        tokens=row.step,
        wps=1.0,
        finite=loss is not None and (unknown or gnorm is not None),
        loss_scale=row.scale,
        skip=row.skip,
        batch=row.batch,
        batch_tokens=row.tokens,
        stage=row.stage,
    )


def to_points(rows: Iterable[Row]) -> list[Point]:
    """All of them."""
    return [to_point(row) for row in rows]


def read(path: Path) -> tuple[Rows, list[str]]:
    """A CSV file's rows, and the attempt that each belongs to (empty where the file does not say)."""
    rows, attempts = [], []
    with path.open(newline="") as lines:
        for cells in csv.DictReader(lines):
            gnorm, lr = cells.get("grad_norm"), cells.get("lr")
            rows.append(
                Row(
                    int(cells["step"]),
                    float(cells["loss"]),
                    float(gnorm) if gnorm else None,
                    float(lr) if lr else None,
                )
            )
            attempts.append(cells.get("attempt") or "")
    return rows, attempts


def noise_sd(rows: Rows, at: int, reach: int = 200) -> float:
    """Of the points before place `at`: the interquartile range around a straight line, over 1.349."""
    losses = [row.loss for row in rows[max(0, at - reach) : at] if math.isfinite(row.loss)]
    n = len(losses)
    if n < 8:
        return 0.02
    half = n // 2
    early, late = median(losses[:half]), median(losses[half:])
    off = sorted(loss - early - (late - early) * (k - half / 2) / (n - half) for k, loss in enumerate(losses))
    return max(1e-4, (off[3 * n // 4] - off[n // 4]) / 1.349)


# ---- healthy curves, drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a run looks like that nothing happens to."""

    noise: str  # a name in NOISES
    sd: float
    every: int = 1  # which steps are logged
    schedule: str = "cosine"
    peak: float = 3e-4
    warmup: int = 500
    horizon: int = 100_000  # steps of the schedule
    start: int = 0  # the first step that is in the log
    bottom: float = 1.9
    power: float = 0.35
    pace: float = 120.0  # steps; the smaller, the faster the early fall
    norm: bool = True
    lr: bool = True
    scale: bool = False
    batch: bool = False
    habits: tuple[str, ...] = ()  # names in HABITS


Noise = Callable[[], float]


def _white(rng: random.Random, sd: float, every: int) -> Noise:
    return lambda: rng.gauss(0, sd)


def _tails(rng: random.Random, sd: float, every: int) -> Noise:
    return lambda: sd * 0.8 * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 1 / 1.5))


def _correlated(rng: random.Random, sd: float, every: int) -> Noise:
    held, keep = 0.0, rng.choice((0.5, 0.9, 0.98))
    part = 0.7 * math.sqrt(1 - keep * keep)

    def noise() -> float:
        nonlocal held
        held = keep * held + part * rng.gauss(0, sd)
        return held + 0.7 * rng.gauss(0, sd)

    return noise


def _blocks(rng: random.Random, sd: float, every: int) -> Noise:
    """A block lasts for steps, whichever of them are logged."""
    high, rise = False, sd * rng.uniform(3, 12)
    ends, begins = 1 - rng.uniform(0.7, 0.95), 0.05
    usual, forgets = begins / (begins + ends), 1 - (1 - begins - ends) ** every

    def noise() -> float:
        nonlocal high
        high = rng.random() < (1 - forgets * (1 - usual) if high else forgets * usual)
        return rng.gauss(0, sd) + (rise if high else 0.0)

    return noise


def _sources(rng: random.Random, sd: float, every: int) -> Noise:
    share, rise = rng.choice((0.04, 0.15, 0.4)), sd * rng.uniform(5, 20)
    return lambda: rng.gauss(0, sd) + (rise if rng.random() < share else 0.0)


def _three(rng: random.Random, sd: float, every: int) -> Noise:
    rises = (0.0, 0.0, 0.0, sd * rng.uniform(4, 8), sd * rng.uniform(10, 20))
    return lambda: rng.gauss(0, sd) + rng.choice(rises)


def _skewed(rng: random.Random, sd: float, every: int) -> Noise:
    return lambda: sd * (rng.gammavariate(2.0, 1.0) - 2.0) / math.sqrt(2.0)


def _outliers(rng: random.Random, sd: float, every: int) -> Noise:
    return lambda: rng.gauss(0, sd) + (sd * rng.uniform(5, 12) if rng.random() < 0.002 else 0.0)


NOISES: dict[str, tuple[Callable[[random.Random, float, int], Noise], float, float]] = {
    "global batch": (_white, 0.01, 0.03),
    "mini-batch": (_white, 0.05, 0.15),
    "heavy tails": (_tails, 0.01, 0.06),
    "correlated": (_correlated, 0.01, 0.06),
    "blocks": (_blocks, 0.01, 0.04),
    "two sources": (_sources, 0.01, 0.04),
    "three sources": (_three, 0.01, 0.05),
    "skewed": (_skewed, 0.01, 0.08),
    "outliers": (_outliers, 0.01, 0.04),
}
"""Kinds of noise, with the range of their sd in nats."""

PLAIN = ("global batch", "mini-batch", "correlated", "skewed", "outliers")
"""Noises in which a person sees a rise of three sd that stays."""


def draw(rng: random.Random, *, noises: Iterable[str] = tuple(NOISES), every: int | None = None) -> Look:
    """A look."""
    name = rng.choice(list(noises))
    _, low, high = NOISES[name]
    logged = every or rng.choice((1, 1, 1, 1, 5, 5, 10, 10, 50, 100, 200, 1000))
    early = rng.random() < 0.35
    late = rng.choice((3_000, 10_000, 40_000)) * max(1, logged // 10)
    schedule = rng.choice(("linear", "cosine", "wsd", "inverse sqrt", "constant"))
    return Look(
        noise=name,
        sd=math.exp(rng.uniform(math.log(low), math.log(high))),
        every=logged,
        schedule=schedule,
        peak=10 ** rng.uniform(-4.3, -2.8),
        warmup=rng.choice((0, 100, 500, 2000)) if early else 500,
        horizon=max(60_000, 6_000 * logged),
        start=0 if early else late,
        bottom=rng.uniform(1.5, 2.8),
        power=rng.uniform(0.25, 0.6),
        pace=math.exp(rng.uniform(math.log(30), math.log(500))),
        norm=rng.random() < 0.7,
        lr=rng.random() < 0.7,
        scale=rng.random() < 0.2,
        batch=rng.random() < 0.5,
        habits=tuple(habit for habit in HABITS if rng.random() < 0.1),
    )


def planned_lr(look: Look, step: int) -> float:
    """What the schedule of that look says."""
    if step < look.warmup:
        return look.peak * (step + 1) / look.warmup
    done = min(1.0, (step - look.warmup) / max(1, look.horizon - look.warmup))
    match look.schedule:
        case "linear":
            return look.peak * (1 - 0.9 * done)
        case "cosine":
            return look.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        case "wsd":
            return look.peak * (1.0 if done < 0.8 else 1.0 - 0.95 * (done - 0.8) / 0.2)
        case "inverse sqrt":
            return look.peak * math.sqrt(max(1, look.warmup) / max(1, look.warmup, step))
        case _:
            return look.peak


def level(look: Look, step: int) -> float:
    """The loss without noise: a power law from about ln V, slower in the warm-up, with a fall where the rate decays."""
    real = step if step >= look.warmup else step * step / max(1, look.warmup)
    fall = look.bottom + (10.8 - look.bottom) * (1 + real / look.pace) ** -look.power
    return fall - 0.12 * (1 - planned_lr(look, step) / look.peak if step > look.warmup else 0.0)


# ---- what some healthy runs do besides


def _quieter(rng: random.Random, look: Look, rows: Rows) -> None:
    for n, row in enumerate(rows):
        row.loss += rng.gauss(0, look.sd) * math.exp(-3 * n / len(rows))


def _epochs(rng: random.Random, look: Look, rows: Rows) -> None:
    """The data comes again, and is known."""
    length, fall = rng.randrange(len(rows) // 6 + 1, len(rows)), look.sd * rng.choice((1, 4, 15))
    for n, row in enumerate(rows):
        row.loss -= fall * (n // length)


def _bump(rng: random.Random, look: Look, rows: Rows) -> None:
    middle, width = look.warmup * 1.2 + 100, rng.uniform(80, 200)
    for row in rows:
        row.loss += 0.3 * math.exp(-(((row.step - middle) / width) ** 2))


def _wanders(rng: random.Random, look: Look, rows: Rows) -> None:
    periods = [rng.uniform(300, 3000) for _ in range(3)]
    for n, row in enumerate(rows):
        row.loss += 0.3 * look.sd * sum(math.sin(2 * math.pi * n / period) for period in periods)


def _smoothed(rng: random.Random, look: Look, rows: Rows) -> None:
    mean = rows[0].loss
    for row in rows:
        row.loss = mean = 0.8 * mean + 0.2 * row.loss


def _clipped(rng: random.Random, look: Look, rows: Rows) -> None:
    for row in rows:
        row.gnorm = None if row.gnorm is None else min(row.gnorm, 0.5)


def _wild(rng: random.Random, look: Look, rows: Rows) -> None:
    for row in rows:
        if row.gnorm is not None:
            row.gnorm *= rng.lognormvariate(0, 0.5) * (20 if rng.random() < 0.003 else 1)


def _rounded(rng: random.Random, look: Look, rows: Rows) -> None:
    for row in rows:
        row.loss = round(row.loss, 2)


def _gap(rng: random.Random, look: Look, rows: Rows) -> None:
    """Lines are missing: at one place many, elsewhere some."""
    gaps = {rng.randrange(1, len(rows)): rng.randrange(20, 300), **{rng.randrange(1, len(rows)): 1 for _ in range(50)}}
    ahead = 0
    for n, row in enumerate(rows):
        ahead += gaps.get(n, 0) * look.every
        row.step += ahead


def _sparser(rng: random.Random, look: Look, rows: Rows) -> None:
    """From some place on, fewer steps are logged."""
    since, more = rng.randrange(len(rows) // 4, len(rows)), rng.choice((2, 10))
    first = rows[since].step
    for row in rows[since:]:
        row.step = first + more * (row.step - first)


def _other_scale(rng: random.Random, look: Look, rows: Rows) -> None:
    """No nats per token: a sum, or another kind of model."""
    factor = rng.choice((0.02, 0.2, 30.0))
    for row in rows:
        row.loss *= factor


HABITS: dict[str, Callable[[random.Random, Look, Rows], None]] = {
    "quieter with time": _quieter,
    "epochs": _epochs,
    "bump after the warm-up": _bump,
    "wanders": _wanders,
    "smoothed": _smoothed,
    "clipped norm": _clipped,
    "wild norm": _wild,
    "rounded": _rounded,
    "a gap": _gap,
    "sparser later": _sparser,
    "other scale": _other_scale,
}


def healthy(rng: random.Random, look: Look, points: int) -> Rows:
    """A curve of that look."""
    noise = NOISES[look.noise][0](rng, look.sd, look.every)
    base, spread, tokens = 10 ** rng.uniform(-1, 0.3), rng.uniform(0.05, 0.25), rng.choice((256, 512, 2048))
    scale, since, wait = 2.0 ** rng.choice((16, 16, 32)), 0, 0
    rows = []
    for n in range(points):
        step = look.start + n * look.every
        row = Row(step, level(look, step) + noise())
        if look.norm:
            early = 1 + 4 * math.exp(-step / 300)
            row.gnorm = base * early * rng.lognormvariate(0, spread) * (4 if rng.random() < 0.0006 else 1)
        if look.lr:
            row.lr = planned_lr(look, step)
        if look.batch:
            row.batch, row.tokens = tokens, tokens * 2048
        if look.scale:
            row.scale, since = scale, since + look.every
            overflow = scale > 2.0**18 or (since > wait and rng.random() < 0.5)
            if overflow:
                row.skip, row.gnorm, scale, since = "overflow", None, scale / 2, 0
                wait = rng.randrange(400, 3000) if scale <= 2.0**18 else 0
            elif since >= 1000 and scale < 2.0**17:
                scale, since = scale * 2, 0
        rows.append(row)
    for habit in look.habits:
        HABITS[habit](rng, look, rows)
    return rows
