"""Cases made by putting something into a healthy curve, real or drawn: faults, spikes that heal, harmless events,
losses that are too low. Heights count in the curve's own noise (sd); times are logged points unless they say steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks.signals_curves import PLAIN, Row, Rows, draw, healthy, noise_sd
from benchmarks.signals_rules import Case


@dataclass(frozen=True, slots=True)
class Here:
    """Where an event is put in: the curve's noise, how much it falls while it is watched, and what is drawn there."""

    rng: random.Random
    sd: float
    every: int
    fall: float
    watched: int
    levels: tuple[float, ...] = ()  # medians of every 32 points from the onset on

    def progress(self, n: int) -> float:
        """How far the untouched loss has fallen by the n-th point."""
        place = min(n / 32, len(self.levels) - 1.001)
        low, part = self.levels[int(place)], place % 1
        return self.levels[0] - low - part * (self.levels[int(place) + 1] - low)

    def height(self, *sds: float, nats: float = 0.0) -> float:
        """A height that a person would see: so many sd, at least `nats`, and above what the loss falls by itself."""
        return max(self.rng.choice(sds) * self.sd, nats, 1.5 * self.fall)

    def block(self, low: int, high: int) -> int:
        """Points of something that lasts so many steps; where few are logged, of a few points."""
        return max(self.rng.randrange(2, 9), self.rng.randrange(low, high) // self.every)


Change = Callable[[int, Row], None]
"""What happens to the n-th point after the onset. It changes the row."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of event: `make` draws one; it is watched for `watched` points."""

    name: str
    make: Callable[[Here], Change]
    watched: int = 800


def _add(shape: Callable[[int], float]) -> Change:
    def change(n: int, row: Row) -> None:
        row.loss += shape(n)

    return change


def _stays(height: float) -> Change:
    return _add(lambda _: height)


def _with_norm(change: Change, factor: Callable[[int], float]) -> Change:
    def both(n: int, row: Row) -> None:
        change(n, row)
        if row.gnorm is not None:
            row.gnorm *= factor(n)

    return both


# ---- faults: a rollback is right


def _step(sds: float) -> Callable[[Here], Change]:
    return lambda here: _stays(here.height(sds))


def _nats(low: float, high: float) -> Callable[[Here], Change]:
    return lambda here: _stays(here.height(4, nats=here.rng.uniform(low, high)))


def _rise(points: int) -> Callable[[Here], Change]:
    def make(here: Here) -> Change:
        height = here.height(5, 8, 20)
        return _add(lambda n: height * min(1.0, (n + 1) / points))

    return make


def _blow_up(doubling: int) -> Callable[[Here], Change]:
    return lambda here: _add(lambda n, s=here.sd: min(8.0, 0.3 * s * 2 ** min(60.0, n / doubling)))


def _drift(here: Here) -> Change:
    slope = here.height(5, 8, 12) / 600
    return _add(lambda n: slope * (n + 1))


def _partly(here: Here) -> Change:
    high, half = here.height(20, 40), here.rng.randrange(3, 20)
    stays = here.height(4, 8) / high
    return _add(lambda n: high * (stays + (1 - min(1.0, stays)) * 0.5 ** (n / half)))


def _jump_with_norm(here: Here) -> Change:
    up = here.rng.uniform(2, 10)
    return _with_norm(_stays(here.height(3, 5)), lambda _: up)


def _norm_leads(here: Here) -> Change:
    up, lead, height = here.rng.uniform(3, 10), here.rng.randrange(20, 100), here.height(6, 12)
    return _with_norm(
        _add(lambda n: height * min(1.0, max(0.0, (n - lead) / 50))), lambda n: 1 + (up - 1) * min(1.0, n / lead)
    )


def _wilder(here: Here) -> Change:
    height, wild, rng = here.height(4, 8), here.rng.uniform(1.5, 3) * here.sd, here.rng
    return _add(lambda n: height * min(1.0, n / 100) + rng.gauss(0, wild))


def _constant(here: Here) -> Change:
    times, held = here.rng.uniform(1.5, 4), []

    def change(_: int, row: Row) -> None:
        held.append(row.loss * times)
        row.loss = held[0]

    return change


def _nan(here: Here) -> Change:
    before = here.rng.randrange(0, 12)
    return lambda n, row: setattr(row, "loss", math.nan if n >= before else row.loss + 3 * here.sd)


FAULTS = (
    Kind("step of 3 sd", _step(3)),
    Kind("step of 5 sd", _step(5)),
    Kind("step of 8 sd", _step(8), 500),
    Kind("step of 20 sd", _step(20), 500),
    Kind("step of 0.05 to 0.15 nats", _nats(0.05, 0.15)),
    Kind("step of 0.5 to 3 nats", _nats(0.5, 3), 500),
    Kind("rise within 100 points, stays", _rise(100)),
    Kind("rise within 500 points, stays", _rise(500), 1300),
    Kind("blow-up, doubles in 3 points", _blow_up(3), 400),
    Kind("blow-up, doubles in 40 points", _blow_up(40), 600),
    Kind("drift that goes on", _drift, 1300),
    Kind("jump that heals in part", _partly),
    Kind("jump with the norm", _jump_with_norm),
    Kind("norm leads, loss follows", _norm_leads),
    Kind("level and noise rise", _wilder),
    Kind("constant", _constant, 300),
    Kind("not finite", _nan, 200),
    Kind("step of 3 sd, sparse or short", _step(3), 400),
)


# ---- what heals or does no harm


def _heals(low: int, high: int, *, steps: bool = False) -> Callable[[Here], Change]:
    """Up at once or within some points, and back within `low` to `high` points, or steps and at least two points."""

    def make(here: Here) -> Change:
        rng, height = here.rng, here.height(10, 20, 60, nats=here.rng.choice((0.0, 0.5, 2.5)))
        back, norm = rng.randrange(low, high), rng.choice((1, 3, 30, 300))
        back = max(rng.randrange(2, 6), back // here.every) if steps else back
        rise = min(rng.choice((1, 1, 2, 5, 10)), max(1, back // 4))
        form = rng.choice(("exponential", "exponential", "line", "late"))

        def shape(n: int) -> float:
            if n < rise:
                return height * (n + 1) / rise
            at = (n - rise) / back
            match form:
                case "exponential":
                    return height * 0.01**at
                case "line":
                    return height * max(0.0, 1 - at)
                case _:
                    return height / (1 + math.exp(min(99.0, 12 * (at - 0.5))))

        return _with_norm(_add(shape), lambda n: 1 + (norm - 1) * shape(n) / height)

    return make


def _twice(here: Here) -> Change:
    first, second = (_heals(5, 40, steps=True)(here) for _ in range(2))
    gap = max(6, here.rng.randrange(20, 120) // here.every)

    def change(n: int, row: Row) -> None:
        first(n, row)
        if n >= gap:
            second(n - gap, row)

    return change


HEALED = (
    Kind("back within 5 to 20 steps", _heals(5, 20, steps=True)),
    Kind("back within 20 to 50 steps", _heals(20, 50, steps=True)),
    Kind("back within 50 to 90 steps", _heals(50, 90, steps=True)),
    Kind("two in a row", _twice),
)
SLOW_HEALERS = (
    Kind("back within 100 to 170 points", _heals(100, 170)),
    Kind("back within 170 to 250 points", _heals(170, 250)),
    Kind("back within 30 to 90 points", _heals(30, 90)),
)


def _outlier(here: Here) -> Change:
    height = here.rng.choice((10 * here.sd, 40 * here.sd, 3.0, 1000.0))
    return _add(lambda n: height if n == 0 else 0.0)


def _group(here: Here) -> Change:
    size, height = here.rng.randrange(2, 5), here.height(10, 40)
    return _add(lambda n: height if n < size else 0.0)


def _every(here: Here) -> Change:
    gap, height = here.rng.randrange(20, 60), here.rng.choice((8, 30)) * here.sd
    return _add(lambda n: height if n % gap == 0 else 0.0)


def _plateau(here: Here) -> Change:
    size, height = here.block(5, 45), here.height(8, 20, 40)
    return _add(lambda n: height if n < size else 0.0)


def _sawtooth(here: Here) -> Change:
    height, period = here.rng.choice((5, 15, 30)) * here.sd, here.rng.randrange(60, 150)
    return _add(lambda n: height * max(0.0, 1 - (n % period) / (0.3 * period)))


def _odd_block(here: Here) -> Change:
    size, height = here.block(10, 60), here.rng.choice((3, 6, 12)) * here.sd
    return _add(lambda n: height if n < size else 0.0)


def _norm_spikes(here: Here) -> Change:
    up, size, gap = here.rng.choice((3, 10, 100)), here.rng.randrange(1, 6), here.rng.randrange(60, 300)
    return _with_norm(_add(lambda _: 0.0), lambda n: up if n % gap < size else 1.0)


def _wider(here: Here) -> Change:
    more, rng = here.sd * here.rng.uniform(1, 2.5), here.rng
    shown = rng.random() < 0.5

    def change(_: int, row: Row) -> None:
        row.loss += rng.gauss(0, more)
        if shown and row.batch:
            row.batch, row.tokens = row.batch // 4, (row.tokens or 0) // 4

    return change


def _swell(here: Here) -> Change:
    height, period = here.rng.uniform(0.3, 0.8) * here.sd, here.rng.randrange(200, 800)
    return _add(lambda n: height * math.sin(2 * math.pi * n / period))


def _dips(here: Here) -> Change:
    size, height = here.rng.randrange(1, 6), here.rng.choice((6, 15)) * here.sd
    return _add(lambda n: -height if n < size else 0.0)


def _no_progress(here: Here) -> Change:
    return _add(here.progress)


def _norm_shift(here: Here) -> Change:
    up = here.rng.choice((0.6, 1.3, 1.6))
    return _with_norm(_add(lambda _: 0.0), lambda n: 1 + (up - 1) * min(1.0, n / 300))


HARMLESS = (
    Kind("one outlier", _outlier),
    Kind("group of 2 to 4 outliers", _group),
    Kind("an outlier every 20 to 60 points", _every),
    Kind("plateau of 5 to 45 steps", _plateau),
    Kind("sawtooth", _sawtooth),
    Kind("odd block of 10 to 60 steps", _odd_block),
    Kind("norm spikes alone", _norm_spikes),
    Kind("wider noise", _wider),
    Kind("slow swell below 1 sd", _swell),
    Kind("low for 1 to 5 points", _dips),
    Kind("no progress for 800 points", _no_progress),
    Kind("norm moves slowly", _norm_shift),
)


def _low(points: int, stays: int | None = None) -> Callable[[Here], Change]:
    def make(here: Here) -> Change:
        height = here.height(8, 15, nats=here.rng.uniform(0.25, 1.2))
        return _add(lambda n: -height * min(1.0, (n + 1) / points) if stays is None or n < stays else 0.0)

    return make


TOO_LOW = (
    Kind("falls at once, stays", _low(1)),
    Kind("falls within 20 points, stays", _low(20)),
    Kind("falls within 60 points, stays", _low(60)),
    Kind("low for 40 points", _low(1, 40)),
    Kind("low for 150 points", _low(1, 150)),
    Kind("falls within 200 points, stays", _low(200)),
)


def put(kinds: tuple[Kind, ...], count: int, real: Mapping[str, Rows], rng: random.Random) -> list[Case]:
    """`count` cases, the kinds in turn, on real and drawn curves."""
    return [_case(kinds[k % len(kinds)], real, random.Random(rng.random())) for k in range(count)]


def base(rng: random.Random, real: Mapping[str, Rows], after: int, sparse: bool = False) -> tuple[str, Rows, int]:
    """A healthy curve, its name, and a place in it after which at least `after` points follow, or most of them."""
    usable = [name for name, rows in real.items() if len(rows) > after + 400]
    if usable and not sparse and rng.random() < 0.5:
        name = rng.choice(sorted(usable))
        rows = real[name]
        at = rng.randrange(300, len(rows) - after)
        begin = 0 if at < 3000 else at - rng.randrange(800, 3000)
        return f"{name} at {rows[at].step}", rows[begin : at + after], at - begin
    look = draw(rng, noises=PLAIN, every=rng.choice((10, 50, 100)) if sparse else None)
    at = rng.randrange(150, 400) if sparse else rng.choice((150, 300, 600, 1200, 2500))
    rows = healthy(rng, look, at + after)
    return f"{look.noise} {look.sd:.3f}, every {look.every}, from {look.start}", rows, at


def _case(kind: Kind, real: Mapping[str, Rows], rng: random.Random) -> Case:
    name, rows, at = base(rng, real, kind.watched, sparse="sparse" in kind.name)
    before, after = rows[max(0, at - 64) : at], rows[at + kind.watched - 64 : at + kind.watched]
    fall = max(0.0, sum(r.loss for r in before) / len(before) - sum(r.loss for r in after) / len(after))
    every = rows[at].step - rows[at - 1].step
    levels = tuple(median(r.loss for r in rows[n - 32 : n + 32]) for n in range(at, at + kind.watched, 32))
    here = Here(rng, noise_sd(rows, at), every, fall, kind.watched, levels)
    return event(kind.name, name, rows, at, kind.make(here), kind.watched, rng)


def event(kind: str, name: str, rows: Rows, at: int, change: Change, watched: int, rng: random.Random) -> Case:
    """The case of that change from place `at` on. Between two logged lines the onset is at any step."""
    changed = [row.copy() for row in rows]
    for n, row in enumerate(changed[at : at + watched]):
        change(n, row)
    onset = rng.randrange(rows[at - 1].step + 1, rows[at].step + 1)
    return Case(kind=kind, name=name, rows=changed, onset=onset, quiet=rows, harmed=harmed(rows, changed, at, onset))


def harmed(rows: Rows, changed: Rows, at: int, onset: int) -> int:
    """The step from which checkpoints are not healthy: the loss is half an sd off, or the norm half as high again."""
    sd = noise_sd(rows, at)

    def bad(was: Row, now: Row) -> bool:
        norm = was.gnorm is not None and now.gnorm is not None and now.gnorm > 1.5 * was.gnorm
        return norm or not abs(now.loss - was.loss) < 0.5 * sd

    pairs = zip(rows[at:], changed[at:], strict=True)
    n = next((n for n, (was, now) in enumerate(pairs) if bad(was, now)), 0)
    return onset if n == 0 else rows[at + n].step
