"""L(N, D) = E + A/N^α + B/D^β, fitted to the settled losses of several sizes, and what it expects of another size.

The form and the fit are those of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): the Huber loss with δ = 1e-3 of
the differences of logarithms, minimised by L-BFGS from a grid of starts. The bands are ours; docs/campaign.md says how
they are made. The same curves give the same numbers: the draws have a fixed seed.

This is the one module outside the trainer that computes with NumPy and SciPy (extra `campaign`). Only the command that
draws a campaign imports it, in a process of its own: the daemon never waits for a fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Before NumPy is loaded. The matrices are small: with two threads on two busy processors a fit takes ten times the CPU.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from scipy.optimize import minimize

from opt_ops.core.campaign.values import Band, Law

DELTA = 1e-3
"""Of the Huber loss: smaller differences of logarithms count by their square, larger ones by their amount."""
LEAST_SIZES = 3
"""E, A and α need three sizes; B and β come from their curves."""
BAND = 0.95
"""Share of the draws between the ends of a band."""
_DRAWS = 250
_KEPT_STARTS = 4
_ROUNDS = 25  # of the fits to drawn losses
_BLOCK = 4  # neighbouring losses of a curve that are drawn together: their noise is alike
# An assumption: so far apart, as a share of the loss, end two runs that differ by their seed alone. Where few sizes are
# known, it counts as much as this number of measured ones: of three sizes, nothing says how far one lies off the law.
_SPREAD, _WORTH = 0.003, 3.0
_LOW = np.array([-12.0, 0.02, -12.0, 0.02, -6.0])
_HIGH = np.array([4.0, 1.5, 4.0, 1.5, 4.0])
"""Bounds of log A/N^α and log B/D^β at the mean size and number of tokens, of α and β, and of log E."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCurve:
    """The settled losses of one size, in nats per token: at which shares of its planned tokens, after how many."""

    recipe: str
    parameters: int
    shares: Sequence[float]
    tokens: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the law expects of a size: on the way, and at the end of its tokens."""

    law: Law
    low: Law  # each parameter's own interval: they do not vary alone
    high: Law
    points: int  # that the law was fitted to
    curve: tuple[Band, ...]  # the last one is the end


def expect(curves: Sequence[SizeCurve], parameters: int, tokens: float, shares: Sequence[float]) -> Expected:
    """Fit the law to `curves`, and say what a size of so many parameters comes to.

    Args:
        curves: At least `LEAST_SIZES` sizes, each with at least one loss.
        parameters: Of the size that is not trained yet.
        tokens: That it is planned to see.
        shares: Of these tokens, at which its loss is expected; the last one is 1.
    """
    fitted = _Fitted(curves, shares)
    n, d = np.full(len(shares), np.log(parameters)), np.log(np.asarray(shares) * tokens)
    middle = fitted.predicted(fitted.best[None], fitted.residuals[None], n, d)[0]
    drawn = fitted.draws(n, d)
    edges = [50 - 50 * BAND, 50 + 50 * BAND]
    low, high = np.percentile(drawn.predicted, edges, axis=0)
    lowest, highest = np.percentile(fitted.natural(drawn.theta), edges, axis=0)
    losses = np.exp([middle, np.minimum(low, middle), np.maximum(high, middle)]).T
    return Expected(
        law=_law(fitted.natural(fitted.best[None])[0]),
        low=_law(lowest),
        high=_law(highest),
        points=len(fitted.y),
        curve=tuple(
            Band(tokens=round(share * tokens), loss=float(m), low=float(a), high=float(b))
            for share, (m, a, b) in zip(shares, losses, strict=True)
        ),
    )


def _law(of: Array) -> Law:
    e, a, alpha, b, beta = map(float, of)
    return Law(E=e, A=a, alpha=alpha, B=b, beta=beta)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What residuals consist of, one row for each row of residuals."""

    common: Array  # of all sizes alike, at each share
    slope: Array  # for each unit of log N beyond `middle`, at each share
    own: Array  # of each size, at all shares alike
    left: Array  # of each point: its noise
    deviation: Array  # of that noise


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Fits to drawn losses, one row each, and what each of them expects of the new size."""

    theta: Array
    predicted: Array


class _Fitted:
    """The best fit. N and D are measured from their means, so that the optimizer's steps have one scale."""

    def __init__(self, curves: Sequence[SizeCurve], shares: Sequence[float]) -> None:
        counts = [len(each.losses) for each in curves]
        self.sizes, self.shares = len(curves), np.asarray(shares)
        self.size = np.repeat(np.arange(self.sizes), counts)
        self.at = np.argmin(np.abs(np.concatenate([each.shares for each in curves])[:, None] - self.shares), axis=1)
        n = np.repeat(np.log([each.parameters for each in curves]), counts)
        d = np.log(np.concatenate([each.tokens for each in curves]))
        self.n0, self.d0 = n.mean(), d.mean()
        self.n, self.d = n - self.n0, d - self.d0
        self.y = np.log(np.concatenate([each.losses for each in curves]))
        self.weight = 1.0 / np.asarray(counts, float)[self.size] / self.sizes  # each size counts the same
        point = np.full((self.sizes, len(shares)), -1)
        point[self.size, self.at] = np.arange(len(self.y))
        self.point, self.there = point, point >= 0
        self.count = self.there.sum(axis=0)  # of the sizes that have a loss at a share
        of_size = np.log([each.parameters for each in curves])[:, None] - self.n0
        self.middle = np.where(self.there, of_size, 0.0).sum(axis=0) / np.maximum(self.count, 1)
        self.beyond = np.where(self.there & (self.count > 2), of_size - self.middle, 0.0)
        self.best = self._fit()
        self.residuals = self.y - _log_loss(self.best[None], self.n, self.d)[0][0]

    def _fit(self) -> Array:
        middle = float(np.exp(np.median(self.y)))
        starts = np.array(
            [
                (np.log(middle * (1 - e) * a), alpha, np.log(middle * (1 - e) * (1 - a)), beta, np.log(middle * e))
                for alpha in (0.05, 0.15, 0.3, 0.5, 0.8)
                for beta in (0.05, 0.15, 0.3, 0.5, 0.8)
                for e in (0.1, 0.3, 0.5, 0.7, 0.9)
                for a in (0.2, 0.5, 0.8)
            ]
        )
        cost = _cost(_log_loss(starts, self.n, self.d)[0] - self.y, self.weight)
        bounds = list(zip(_LOW, _HIGH, strict=True))
        found = [
            minimize(self._objective, starts[i], jac=True, method="L-BFGS-B", bounds=bounds)
            for i in np.argsort(cost)[:_KEPT_STARTS]
        ]
        return min(found, key=lambda each: each.fun).x

    def _objective(self, theta: Array) -> tuple[float, Array]:
        log_loss, slopes = _log_loss(theta[None], self.n, self.d)
        r, scale = log_loss[0] - self.y, DELTA**-2  # of the order of 1, because L-BFGS stops at small slopes
        return scale * _cost(r[None], self.weight)[0], scale * slopes[0] @ (np.clip(r, -DELTA, DELTA) * self.weight)

    def natural(self, theta: Array) -> Array:
        """E, A, α, B, β from the optimizer's form, one row each."""
        a, alpha, b, beta, e = theta.T
        return np.stack([np.exp(e), np.exp(a + alpha * self.n0), alpha, np.exp(b + beta * self.d0), beta], axis=1)

    def predicted(self, theta: Array, residuals: Array, n: Array, d: Array) -> Array:
        """The logarithm of the loss at log N and log D, one value for each share, one row for each fit."""
        parts = self._parts(residuals)
        off_the_law = parts.common + parts.slope * (n - self.n0 - self.middle)
        return _log_loss(theta, n - self.n0, d - self.d0)[0] + off_the_law

    def _parts(self, residuals: Array) -> _Parts:
        """Divide residuals into what all sizes show alike at a share of the schedule, what grows with log N there, what
        each size shows at all shares, and noise.

        The law knows no learning rate: a loss is lower once the rate has decayed, and not by the same factor in small
        and large sizes. Both parts are least squares at each share. Over all shares, each is shrunk by the share of its
        squares that its noise explains, as James and Stein (1961) do.
        """
        all_sizes = np.where(self.there, residuals[:, self.point], 0.0)
        own = all_sizes.sum(axis=2) / np.maximum(self.there.sum(axis=1), 1)
        own = own - own.mean(axis=1, keepdims=True)
        here = np.where(self.there, all_sizes - own[:, :, None], 0.0)
        several, many = self.count > 1, self.count > 2
        common = np.where(several, here.sum(axis=1) / np.maximum(self.count, 1), 0.0)
        squares = (self.beyond**2).sum(axis=0)
        slope = (here * self.beyond).sum(axis=1) / np.where(many, squares, 1.0)
        left = np.where(self.there & several, here - common[:, None] - slope[:, None] * self.beyond, 0.0)
        free = (self.count - 1)[several].sum() - many.sum() - max(0, self.sizes - 2)
        variance = (left**2).sum(axis=(1, 2)) / max(1, free)
        by_chance = variance * (1.0 / self.count[several]).sum()
        common = common * _kept(by_chance, (common**2).sum(axis=1))
        slope = slope * _kept(variance * many.sum(), (squares * slope**2).sum(axis=1))
        return _Parts(common, slope, own, left[:, self.size, self.at], np.sqrt(variance))

    def draws(self, n: Array, d: Array) -> _Drawn:
        """Fit to losses as they could have been, and say what each fit expects of a new size with its own deviation."""
        rng = np.random.default_rng(0)
        parts = self._parts(self.residuals[None])
        free = max(0, self.sizes - LEAST_SIZES)
        measured = (parts.own**2).sum() if free else 0.0
        spread = np.sqrt((_WORTH * _SPREAD**2 + measured) / rng.chisquare(_WORTH + free, (_DRAWS, 1)))
        noise = parts.left[0] * (parts.deviation[0] / max(parts.left[0].std(), 1e-12))
        off_the_law = parts.common[0][self.at] + (parts.slope[0] * self.beyond)[self.size, self.at]
        y = self.y - self.residuals + off_the_law
        y = y + (spread * rng.standard_normal((_DRAWS, self.sizes)))[:, self.size] + self._in_blocks(noise, rng)
        theta = _fit_all(np.repeat(self.best[None], _DRAWS, axis=0), self.n, self.d, y, self.weight)
        predicted = self.predicted(theta, y - _log_loss(theta, self.n, self.d)[0], n, d)
        return _Drawn(theta, predicted + spread * rng.standard_normal((_DRAWS, 1)) + rng.choice(noise, predicted.shape))

    def _in_blocks(self, noise: Array, rng: np.random.Generator) -> Array:
        """Noise for every point, one row for each draw, out of blocks of neighbours of any curve."""
        size = len(noise)
        starts = rng.integers(0, max(1, size - _BLOCK + 1), (_DRAWS, -(-size // _BLOCK)))
        places = np.minimum((starts[:, :, None] + np.arange(_BLOCK)).reshape(_DRAWS, -1)[:, :size], size - 1)
        return noise[places]


def _kept(by_chance: Array, found: Array) -> Array:
    """The share of something found, as a column, that chance does not explain; both are sums of squares."""
    return np.maximum(0.0, 1.0 - by_chance / np.maximum(found, 1e-30))[:, None]


def _log_loss(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Log L for each row of parameters, and its slopes: rows × points, rows × parameters × points."""
    a, alpha, b, beta, e = (column[:, None] for column in theta.T)
    terms = np.stack([a - alpha * n, b - beta * d, np.broadcast_to(e, (len(theta), len(n)))])
    largest = terms.max(axis=0)
    parts = np.exp(terms - largest)
    total = parts.sum(axis=0)
    of_n, of_d, of_e = parts / total
    return largest + np.log(total), np.stack([of_n, -of_n * n, of_d, -of_d * d, of_e], axis=1)


def _cost(residuals: Array, weight: Array) -> Array:
    """The Huber loss of each row."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)) @ weight


def _fit_all(theta: Array, n: Array, d: Array, y: Array, weight: Array) -> Array:
    """Fit each row of parameters to its row of losses, all at once: a call of L-BFGS for each took ten times the CPU.

    Levenberg and Marquardt's steps for the same Huber loss, by weights. A row keeps its parameters unless a step lowers
    its cost.
    """
    damping = np.full(len(theta), 1e-3)
    log_loss, slopes = _log_loss(theta, n, d)
    cost = _cost(log_loss - y, weight)
    for _ in range(_ROUNDS):
        r = log_loss - y
        weighted = slopes * (weight * np.minimum(1.0, DELTA / np.maximum(np.abs(r), 1e-12)))[:, None, :]
        normal = weighted @ slopes.transpose(0, 2, 1)
        diagonal = np.einsum("rii->ri", normal)
        damped = normal + np.eye(5) * (damping[:, None] * diagonal + 1e-15)[:, None, :]
        step = np.linalg.solve(damped, (weighted @ r[:, :, None]))[:, :, 0]
        tried = np.clip(theta - step, _LOW, _HIGH)
        new_loss, new_slopes = _log_loss(tried, n, d)
        new_cost = _cost(new_loss - y, weight)
        better = new_cost < cost
        theta, cost = np.where(better[:, None], tried, theta), np.where(better, new_cost, cost)
        log_loss, slopes = (
            np.where(better[:, None], new_loss, log_loss),
            np.where(better[:, None, None], new_slopes, slopes),
        )
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e6)
    return theta
