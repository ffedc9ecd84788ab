"""The forecast of a curve: what it foretells, when it says that it does not know, and when a curve has left it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.forecast import ForecastDetector
from opt_ops.core.detect.history import CurveHistory
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.power_law import Cells, fit
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier

STEPS, WARM, PEAK = 12_000, 200, 3e-4


def linear(step: int) -> float:
    return PEAK * min(step / WARM, 1.0 - 0.9 * (step - WARM) / (STEPS - WARM))


def cosine(step: int) -> float:
    turn = math.pi * (step - WARM) / (STEPS - WARM)
    return PEAK * (step / WARM if step < WARM else 0.1 + 0.45 * (1.0 + math.cos(turn)))


def stable_then_decayed(step: int) -> float:
    return PEAK * min(1.0, step / WARM, max(0.02, (STEPS - step) / (0.2 * STEPS)))


def unknown(step: int) -> float:
    return 0.0


SCHEDULES = [linear, cosine, stable_then_decayed, unknown]


def curve(
    lr: Callable[[int], float], seed: int = 1, noise: float = 0.03, flat_from: int = STEPS, first: int = 1
) -> Iterator[Point]:
    """A curve of two power laws, with annealing that comes late; from `flat_from` on it learns nothing more."""
    draw = random.Random(seed)
    rate = lr if lr is not unknown else linear
    low, annealed, progress = draw.uniform(1.8, 2.4), 0.0, 0.0
    for step in range(first, STEPS + 1):
        annealed += (rate(step) / PEAK - annealed) / 200
        progress += 0.5 + 0.5 * rate(step) / PEAK if step < flat_from else 0.0
        loss = low + 5.0 * (1 + progress / 30) ** -0.6 + 1.5 * (1 + progress / 800) ** -0.25 + 0.08 * annealed
        loss += draw.gauss(0.0, noise)
        if draw.random() < 0.001:
            loss += draw.uniform(5, 30) * noise
        yield Point(
            step=step, ts=float(step), loss=loss, gnorm=None, lr=lr(step), betas=(), weight_decay=0.0, clip_norm=0.0,
            step_seconds=0.0, tokens=0, wps=0.0, finite=True,
        )  # fmt: skip


def found(detector: ForecastDetector, points: Iterator[Point]) -> list[Finding]:
    return [finding for point in points for finding in detector.observe(point)]


@pytest.mark.parametrize("lr", SCHEDULES)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_healthy_curve_does_not_leave_its_forecast(lr: Callable[[int], float], seed: int):
    assert found(ForecastDetector(), curve(lr, seed)) == []


@pytest.mark.parametrize("lr", SCHEDULES[:3])
def test_a_curve_that_learns_no_more_leaves_its_forecast_for_good(lr: Callable[[int], float]):
    alerts = found(ForecastDetector(), curve(lr, flat_from=4_200))
    assert alerts
    first = alerts[0]
    assert (first.signal, first.tier) == (AlertSignal.OFF_FORECAST, Tier.ALERT)
    assert 4_200 <= first.onset_step < first.step < 2.2 * 4_200
    assert first.evidence["loss"] > first.evidence["upper"] > first.evidence["expected"]


def test_a_spike_of_a_hundred_steps_is_no_trend():
    def spiked() -> Iterator[Point]:
        for point in curve(linear):
            assert point.loss is not None
            high = 3.0 if 3_000 <= point.step < 3_100 else 0.0
            yield Point(**{name: getattr(point, name) for name in point.__slots__} | {"loss": point.loss + high})

    assert found(ForecastDetector(), spiked()) == []


def test_what_was_planned_is_learned_anew():
    def raised() -> Iterator[Point]:
        for point in curve(linear):
            assert point.loss is not None
            high = 0.4 if point.step >= 5_000 else 0.0
            yield Point(**{name: getattr(point, name) for name in point.__slots__} | {"loss": point.loss + high})

    assert found(ForecastDetector(), raised())
    assert found(ForecastDetector([5_000]), raised()) == []
    history = CurveHistory(lambda: LossDetector(SpikeRule()))
    history.plan(5_000)
    alerts = [f for point in raised() for f in history.observe(point) if f.signal == AlertSignal.OFF_FORECAST]
    assert alerts == []


def test_what_an_attempt_discarded_is_forgotten():
    detector = ForecastDetector()
    points = list(curve(linear))
    assert found(detector, iter(points[:6_000])) == []
    bad = [Point(**{n: getattr(p, n) for n in p.__slots__} | {"loss": 9.0}) for p in points[6_000:6_200]]
    assert found(detector, iter(bad)) == []
    detector.begin(6_000)
    assert found(detector, iter(points[6_000:])) == []


@pytest.mark.parametrize("lr", SCHEDULES[:3])
@pytest.mark.parametrize("share", [4, 2])
def test_the_end_lies_in_the_range(lr: Callable[[int], float], share: int):
    cells, ahead, progress = Cells(), 0.0, 0.0
    losses = []
    for point in curve(lr, seed=5):
        assert point.loss is not None
        progress += point.lr
        if point.step <= STEPS // share:
            cells.add(point.step, point.loss, point.lr)
        ahead = progress
        losses.append(point.loss)
    made = fit(cells.closed, cells.peak)
    assert made is not None
    end = made.at(STEPS, ahead, lr(STEPS))
    true = sorted(losses[-200:])[100]
    assert end.low < true < end.high
    assert abs(end.expected - true) < 0.1


def test_too_few_points_give_no_forecast():
    cells = Cells()
    for point in curve(linear):
        assert point.loss is not None
        if point.step > WARM + 60:
            break
        cells.add(point.step, point.loss, point.lr)
    assert fit(cells.closed, cells.peak) is None
    assert fit([], 0.0) is None


def test_memory_is_bounded():
    cells = Cells()
    for step in range(1, 200_000):
        cells.add(step, 2.0 + 1.0 / step, 0.0)
    assert len(cells.closed) < 600
