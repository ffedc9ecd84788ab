"""A scaling fit: the loss as E + A · (progress + p0)^−α + C · (lr / its highest), with the range of what fits as well.

The curve is compressed into cells first: 32 for each doubling of the step, each the median of its points. So a fit has
at most `_OCTAVES` · 32 cells, whatever the length of the run.

*Progress* is the sum of learning rates, in units of the highest one. C is what annealing takes off the loss. Both are
as in the scaling law with annealing of Tissue, Wang and Wang (2024), with a simpler annealing term. Where the learning
rate is not known, progress is the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

CELLS = 32
"""Cells for each doubling of the step."""
_POINTS = 64  # of a cell, at most: of more, every second, fourth, … is kept
_OCTAVES = 3  # that a fit looks back: what the first steps look like says little about the rest
LEAST_CELLS = 24
_EXPONENTS = tuple(0.1 * 1.22**k for k in range(11))
"""0.1 to 0.73. Published exponents are 0.08 to 0.5; a steeper fit takes an early bend of the curve for its floor."""
_OFFSETS = (0.0, 0.01, 0.04, 0.16)  # of the progress so far
_ANNEALED = 0.04
"""What annealing to zero takes off the loss, as a share of it, where the curve does not say: 0.04 ± 0.04."""
_VARIED = 0.25
"""So far must the learning rate have fallen, as a share of its highest, before the curve says what that does."""
_DEVIATIONS = 3.0  # of the range


@dataclass(frozen=True, slots=True)
class Cell:
    """Points of a curve that lie close together.

    Attributes:
        step: of its last point.
        progress: at its last point.
        loss: the median.
        lr: the last learning rate; 0 where it is not known.
        points: number of points.
    """

    step: int
    progress: float
    loss: float
    lr: float
    points: int


class Cells:
    """Compresses a curve while it is read. Memory is bounded: some hundred cells, and the points of the newest one."""

    def __init__(self) -> None:
        self.closed: list[Cell] = []
        self.peak = 0.0
        """The highest learning rate so far."""
        self.seen = 0
        """Points so far."""
        self._losses: list[float] = []
        self._stride, self._count = 1, 0
        self._step, self._lr, self._area = 0, 0.0, 0.0

    def add(self, step: int, loss: float, lr: float) -> Cell | None:
        """Take in a point; steps rise. Returns the cell that it has closed, if any."""
        closed = self._close() if self._losses and _cell_of(step) != _cell_of(self._step) else None
        self._area += lr * (step - self._step)
        self.peak = max(self.peak, lr)
        if self._count % self._stride == 0:
            self._losses.append(loss)
            if len(self._losses) > _POINTS:
                self._losses, self._stride = self._losses[::2], 2 * self._stride
        self._count, self.seen = self._count + 1, self.seen + 1
        self._step, self._lr = step, lr
        return closed

    def discard_after(self, step: int) -> None:
        """Forget the points after `step`, as far as their cells show it."""
        self._losses, self._stride, self._count = [], 1, 0
        while self.closed and self.closed[-1].step > step:
            self.closed.pop()
        last = self.closed[-1] if self.closed else None
        self.seen = sum(cell.points for cell in self.closed)
        self._step, self._lr, self._area = (last.step, last.lr, last.progress) if last else (step, 0.0, 0.0)

    def _close(self) -> Cell:
        cell = Cell(self._step, self._area, median(self._losses), self._lr, self._count)
        self.closed.append(cell)
        self._losses, self._stride, self._count = [], 1, 0
        return cell


def _cell_of(step: int) -> int:
    return int(CELLS * math.log2(max(1, step)))


@dataclass(frozen=True, slots=True)
class _Law:
    """One set of parameters: the loss at a progress and a learning rate, relative to the highest."""

    exponent: float
    offset: float
    floor: float
    scale: float
    annealed: float

    def loss(self, progress: float, lr: float) -> float:
        return self.floor + self.scale * (progress + self.offset) ** -self.exponent + self.annealed * lr


@dataclass(frozen=True, slots=True)
class Range:
    """The loss that is expected, and between which bounds."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A fit, and everything that fits as well.

    Attributes:
        step: of the last cell that it has seen.
        best: the parameters that fit best.
        noise: standard deviation of a cell around the fit, in nats.
        correlation: number of cells in a row that count as one, because their residuals are alike.
        missed: by how much such a fit may miss an octave, from how it would have missed the last two.
        laws: parameters that fit about as well as the best.
        progress, lr: at the last cell, relative to the highest learning rate.
        peak: that learning rate; 0 where it is not known.
        annealing: the uncertainty of what annealing to zero takes off, in nats.
    """

    step: int
    best: _Law
    noise: float
    correlation: float
    missed: float
    laws: tuple[_Law, ...]
    progress: float
    lr: float
    peak: float
    annealing: float

    def at(self, step: int, progress: float, lr: float) -> Range:
        """The loss at a later step.

        Args:
            step: the step.
            progress: the sum of learning rates up to it; not used where they are not known.
            lr: the learning rate there.
        """
        x, relative = self._place(step, progress, lr)
        expected = self.best.loss(x, relative)
        found = [law.loss(x, relative) for law in self.laws]
        octaves = max(1.0, math.log2(max(x, 1e-30) / self.progress)) if x > 0 else 1.0
        more = math.hypot(_DEVIATIONS * self.noise, self.missed * octaves, self.annealing * abs(relative - self.lr))
        return Range(max(0.0, min(found) - more), expected, max(found) + more)

    def _place(self, step: int, progress: float, lr: float) -> tuple[float, float]:
        return (progress / self.peak, lr / self.peak) if self.peak else (float(step), 0.0)


def fit(cells: Sequence[Cell], peak: float) -> Forecast | None:
    """Fit the last `_OCTAVES` octaves of a curve. None if there are too few cells.

    Args:
        cells: of the curve, in order.
        peak: the highest learning rate; 0 where it is not known.
    """
    whole = _fit(cells, peak)
    if whole is None:
        return None
    misses: list[float] = []
    for back in (1, 2):
        split = whole.step >> back
        before = _fit([cell for cell in cells if cell.step <= split], peak)
        after = [cell for cell in cells if split < cell.step <= 2 * split]
        if before is not None and len(after) >= CELLS // 2:
            residuals = [cell.loss - before.at(cell.step, cell.progress, cell.lr).expected for cell in after]
            misses.append(abs(median(residuals[len(residuals) // 2 :])))
    # Of three misses of one kind, the last is the largest in one case of three: so twice the larger of two is taken.
    # Without two looks back it is not known how well such a fit foretells: as badly as the curve is steep.
    law, x = whole.best, whole.progress
    missed = 2.0 * max(misses) if len(misses) == 2 else max(0.0, 2.0 * (law.loss(x, 0.0) - law.loss(2.0 * x, 0.0)))
    return replace(whole, missed=missed)


def _fit(cells: Sequence[Cell], peak: float) -> Forecast | None:
    if not cells or (not peak and any(cell.lr for cell in cells)):
        return None
    last = cells[-1]
    known = peak > 0 and all(cell.lr > 0 for cell in cells[-LEAST_CELLS:])
    unit = peak if known else 0.0
    first = next((i for i, cell in enumerate(cells) if cell.lr >= 0.999 * peak), 0) if known else 0
    used = [cell for cell in cells[first:] if cell.step > last.step >> _OCTAVES]
    if len(used) < LEAST_CELLS or used[-1].step < 2 * used[0].step:
        return None
    xs = [cell.progress / unit if unit else float(cell.step) for cell in used]
    lrs = [cell.lr / unit if unit else 0.0 for cell in used]
    losses = [cell.loss for cell in used]
    prior = (_ANNEALED * losses[-1], _ANNEALED * losses[-1]) if unit else (0.0, 0.0)
    fits: list[tuple[float, _Law]] = []
    noise = _differences(losses)
    for exponent in _EXPONENTS:
        for share in _OFFSETS:
            law = _solve(xs, lrs, losses, exponent, share * xs[-1], noise, prior)
            if law is not None:
                fits.append((_cost(law, xs, lrs, losses, noise), law))
    if not fits:
        return None
    least, best = min(fits, key=lambda pair: pair[0])
    residuals = [loss - best.loss(x, lr) for x, lr, loss in zip(xs, lrs, losses, strict=True)]
    spread = max(1.4826 * median(map(abs, residuals)), noise, 1e-6)
    alike = _correlation(residuals)
    # As likely as the best within `_DEVIATIONS`, where cells that are alike count as one (a profile likelihood).
    bound = least * (noise / spread) ** 2 + _DEVIATIONS**2 * alike
    laws = tuple(law for cost, law in fits if cost * (noise / spread) ** 2 <= bound)
    spent = max(lrs) - min(lrs)
    return Forecast(
        step=last.step,
        best=best,
        noise=spread,
        correlation=alike,
        missed=0.0,
        laws=laws,
        progress=xs[-1],
        lr=lrs[-1],
        peak=unit,
        annealing=prior[1] * (1.0 - 0.5 * spent),  # a term that is linear in lr is a simplification: half stays unknown
    )


def _solve(
    xs: Sequence[float],
    lrs: Sequence[float],
    losses: Sequence[float],
    exponent: float,
    offset: float,
    noise: float,
    prior: tuple[float, float],
) -> _Law | None:
    """The best E, A and C for an exponent and an offset: weighted least squares, twice, with Huber's weights."""
    basis = [(x + offset) ** -exponent for x in xs]
    unit = basis[-1]
    basis = [each / unit for each in basis]
    annealed, weights = prior[0], [1.0] * len(xs)
    floor = scale = 0.0
    for _ in range(2):
        rest = [loss - annealed * lr for loss, lr in zip(losses, lrs, strict=True)]
        floor, scale = _line(basis, rest, weights)
        if floor < 0.0:
            floor = 0.0
            scale = sum(w * b * r for w, b, r in zip(weights, basis, rest, strict=True)) / sum(
                w * b * b for w, b in zip(weights, basis, strict=True)
            )
        residuals = [r - floor - scale * b for r, b in zip(rest, basis, strict=True)]
        if prior[1] and max(lrs) - min(lrs) > _VARIED:
            annealed = _annealed(residuals, lrs, basis, weights, annealed, noise, prior)
        weights = [1.0 if abs(r) <= 2.0 * noise else 2.0 * noise / abs(r) for r in residuals]
    if scale < 0.0:
        return None
    return _Law(exponent, offset, floor, scale / unit, annealed)


def _annealed(
    residuals: Sequence[float],
    lrs: Sequence[float],
    basis: Sequence[float],
    weights: Sequence[float],
    now: float,
    noise: float,
    prior: tuple[float, float],
) -> float:
    """C, moved by what residuals say of the part of lr that floor and scale cannot explain, and held by its prior."""
    intercept, slope = _line(basis, lrs, weights)
    own = [lr - intercept - slope * b for lr, b in zip(lrs, basis, strict=True)]
    evidence = sum(w * o * o for w, o in zip(weights, own, strict=True)) / noise**2
    pull = sum(w * o * r for w, o, r in zip(weights, own, residuals, strict=True)) / noise**2
    held = 1.0 / prior[1] ** 2
    return max(0.0, (evidence * now + pull + held * prior[0]) / (evidence + held))


def _line(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the weighted least squares."""
    total = sum(weights)
    x0 = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y0 = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, x in zip(weights, xs, strict=True))
    slope = sum(w * (x - x0) * (y - y0) for w, x, y in zip(weights, xs, ys, strict=True)) / spread if spread else 0.0
    return y0 - slope * x0, slope


def _cost(law: _Law, xs: Sequence[float], lrs: Sequence[float], losses: Sequence[float], noise: float) -> float:
    """Huber's cost, in squares of standard deviations."""
    total = 0.0
    for x, lr, loss in zip(xs, lrs, losses, strict=True):
        off = abs(loss - law.loss(x, lr)) / noise
        total += off * off if off <= 2.0 else 4.0 * off - 4.0
    return total


def _differences(losses: Sequence[float]) -> float:
    """The noise of a cell, from differences of neighbours: the fall of the curve hardly counts in them."""
    steps = [abs(b - 2 * a + c) for a, b, c in zip(losses[1:], losses, losses[2:], strict=False)]
    return max(1.4826 * median(steps) / math.sqrt(6.0), 1e-5)


def _correlation(residuals: Iterable[float]) -> float:
    """How many cells in a row count as one: (1 + ρ) / (1 − ρ), from the correlation of neighbours."""
    values = list(residuals)
    variance = sum(value * value for value in values)
    rho = sum(a * b for a, b in pairwise(values)) / variance if variance else 0.0
    rho = min(max(rho, 0.0), 0.9)
    return (1.0 + rho) / (1.0 - rho)
