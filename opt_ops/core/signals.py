"""Detectors: streaming, deterministic, a bounded amount of work and memory for every telemetry line.

Three tiers: the trainer skips an update by itself; an *alert* says that the gradient norm leaves its band and
rises, which leads the loss peak by a few steps (BLOOM-176B, iterations 31215-31221); *act* says that the loss left
its band and did not heal. A spike that heals within `heal_steps` is never rolled back: BLOOM's healed in about 30.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One telemetry line. `loss` and `gnorm` are None when they were not finite."""

    step: int
    ts: float
    loss: float | None
    gnorm: float | None
    lr: float
    betas: tuple[float, ...]
    weight_decay: float
    clip_norm: float
    step_seconds: float
    tokens: int
    wps: float
    finite: bool
    save_seconds: float = 0.0
    save_error: str | None = None  # what the newest save failed of; untrusted
    loss_scale: float | None = None  # of fp16
    busy: Busy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """How long ranks worked on a step without waiting for others, in seconds: the usual one, and the slowest."""

    median: float
    max: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a detector found, still without its attempt."""

    signal: str
    tier: Tier
    step: int
    onset_step: int
    at: float
    rule: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeRule:
    """When a loss counts as out of its band, and when that calls for a rollback.

    The band ends at median + max(`deviations` · sd, `floor`), the lower of two: over the last `window` steps, which
    notices a slow rise, and over the last `warm` steps with the spread of what they leave unexplained, which follows a
    curve that still falls fast. sd is the interquartile range / 1.349, and steps out of the band are not taken in: a
    spike does not widen its own band. `floor` keeps the band from shrinking below the noise between replicas of one
    run (about 0.055 nats at 15B).
    """

    window: int = 128
    warm: int = 32
    deviations: float = 4.0
    floor: float = 0.1
    persist: int = 3
    of: int = 5
    heal_steps: int = 50
    gnorm_deviations: float = 6.0


class RobustWindow:
    """Median and spread of the last `size` values; insertion costs one bisection and a short move."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """Take in a value; the oldest leaves when the window is full."""
        if len(self._order) == self._size:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """The upper median."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def largest(self) -> float:
        """The largest value."""
        return self._sorted[-1]

    @property
    def sd(self) -> float:
        """Interquartile range / 1.349: the standard deviation of a normal distribution with that range."""
        n = len(self._sorted)
        return (self._sorted[(3 * n) // 4] - self._sorted[n // 4]) / 1.349


class LossDetector:
    """Loss and gradient norm of one curve, in step order."""

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._losses = RobustWindow(rule.window)
        self._trend = RobustWindow(rule.warm)
        self._residuals = RobustWindow(rule.window)
        self._gnorms = RobustWindow(rule.window)
        self._recent: deque[tuple[Point, float]] = deque(maxlen=rule.of)  # with the excess over the band, 0 inside
        self._onset: Point | None = None
        self._acted = False
        self._gnorm_out = 0
        self._rising = 0
        self._last_gnorm = 0.0
        self._alerted_at = -rule.heal_steps
        self._unhealthy: deque[tuple[int, str]] = deque(maxlen=4 * rule.window)

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if not point.finite or point.loss is None or point.gnorm is None:
            return [self._nonfinite(point)]
        findings = self._watch_gnorm(point, point.gnorm)
        findings += self._watch_loss(point, point.loss)
        if self._onset is not None:
            self._unhealthy.append((point.step, "the loss is out of its band"))
        return findings

    def why_unhealthy(self, step: int) -> str:
        """Why the state at `step` should not be gone back to; empty if nothing speaks against it."""
        return next((why for bad, why in self._unhealthy if bad == step), "")

    def _nonfinite(self, point: Point) -> Finding:
        onset = self._onset or point
        self._unhealthy.append((point.step, "not finite"))
        return Finding(
            signal="non_finite_loss",
            tier=Tier.ACT,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule="the loss or the gradient norm is not a finite number",
            evidence={"loss": point.loss, "gnorm": point.gnorm, "lr": point.lr},
        )

    def _watch_gnorm(self, point: Point, gnorm: float) -> list[Finding]:
        rule, window = self._rule, self._gnorms
        limit = window.median + rule.gnorm_deviations * window.sd if len(window) >= rule.warm else float("inf")
        out = gnorm > limit
        self._rising = self._rising + 1 if out and gnorm > self._last_gnorm else 0
        self._last_gnorm = gnorm
        self._gnorm_out = self._gnorm_out + 1 if out else 0
        if self._gnorm_out > rule.window:
            # A whole window out of the band while the loss is fine is the new normal, not a fault.
            self._gnorms, self._gnorm_out = RobustWindow(rule.window), 0
            return []
        if not out:
            window.add(gnorm)
            return []
        self._unhealthy.append((point.step, "the gradient norm is out of its band"))
        if self._rising < 2 or point.step - self._alerted_at < rule.heal_steps:
            return []
        self._alerted_at = point.step
        return [
            Finding(
                signal="gradient_norm",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=point.step - 1,
                at=point.ts,
                rule=f"above median + {rule.gnorm_deviations:g} sd and rising, two steps in a row",
                evidence={"gnorm": gnorm, "median": window.median, "limit": limit, "loss": point.loss},
            )
        ]

    def _watch_loss(self, point: Point, loss: float) -> list[Finding]:
        rule = self._rule
        if len(self._losses) < rule.warm:
            self._take_in(loss)
            return []
        limit = self._limit()
        self._recent.append((point, max(0.0, loss - limit)))
        high = [seen for seen, excess in self._recent if excess > 0]
        if loss <= limit:
            self._take_in(loss)
        if self._onset is None:
            if len(high) < rule.persist:
                return []
            self._onset, self._acted = high[0], False
            return [self._spike(Tier.ALERT, point, loss, limit, f"{rule.persist} of {rule.of} steps out of the band")]
        if not high and len(self._recent) == rule.of:
            self._onset = None
            return []
        if self._acted or point.step - self._onset.step < rule.heal_steps:
            return []
        self._acted = True
        return [self._spike(Tier.ACT, point, loss, limit, f"out of the band and not healed in {rule.heal_steps} steps")]

    def _take_in(self, loss: float) -> None:
        if len(self._trend):
            self._residuals.add(loss - self._trend.median)
        self._trend.add(loss)
        self._losses.add(loss)

    def _limit(self) -> float:
        rule = self._rule
        slow = self._losses.median + max(rule.deviations * self._losses.sd, rule.floor)
        fast = self._trend.median + max(rule.deviations * self._residuals.sd, rule.floor)
        return min(slow, fast)

    def _spike(self, tier: Tier, point: Point, loss: float, limit: float, rule: str) -> Finding:
        onset = self._onset or point
        return Finding(
            signal="loss_spike",
            tier=tier,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule=rule,
            evidence={
                "loss": loss,
                "median": self._trend.median,
                "sd": self._residuals.sd,
                "limit": limit,
                "loss_at_onset": onset.loss,
                "gnorm": point.gnorm,
                "lr": point.lr,
            },
        )
