"""Detectors on curves: noise is left alone, real trouble is named with its onset."""

import random
from dataclasses import replace

import pytest

from opt_ops.core.pace import HangRule, UsualTimes
from opt_ops.core.signals import Finding, Point, RobustWindow
from opt_ops.core.spike import LossDetector, SpikeRule
from opt_ops.core.values import Tier

RULE = SpikeRule()


def point(step: int, loss: float | None, gnorm: float | None = 0.3) -> Point:
    finite = loss is not None and gnorm is not None
    return Point(
        step=step,
        ts=float(step),
        loss=loss,
        gnorm=gnorm,
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip_norm=1.0,
        step_seconds=1.0,
        tokens=step,
        wps=1.0,
        finite=finite,
    )


def curve(steps: int, seed: int, noise: float = 0.05, start: float = 8.0, floor: float = 2.2) -> list[Point]:
    """A healthy run: fast at first, then slow, with noise in loss and gradient norm."""
    rng = random.Random(seed)
    return [
        point(
            step,
            floor + (start - floor) / (1 + step / 60) + rng.gauss(0, noise),
            0.3 * rng.lognormvariate(0, 0.15),
        )
        for step in range(1, steps + 1)
    ]


def findings(points: list[Point], rule: SpikeRule = RULE) -> list[Finding]:
    detector = LossDetector(rule)
    return [finding for each in points for finding in detector.observe(each)]


def acts(points: list[Point]) -> list[Finding]:
    return [finding for finding in findings(points) if finding.tier is Tier.ACT]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_a_healthy_curve_is_left_alone(seed: int, noise: float):
    assert acts(curve(4000, seed, noise)) == []


def with_jump(points: list[Point], at: int, height: float, length: int) -> list[Point]:
    """The loss jumps by `height` at a step and stays up for `length` steps."""
    return [
        replace(p, loss=p.loss + height) if p.loss is not None and at <= p.step < at + length else p for p in points
    ]


@pytest.mark.parametrize(("at", "height"), [(150, 2.0), (150, 6.0), (1000, 0.5), (1000, 2.0), (3000, 0.5), (3000, 6.0)])
def test_a_divergence_is_acted_on_once_with_its_onset(at: int, height: float):
    (act,) = acts(with_jump(curve(4000, seed=1), at, height, 10_000))
    assert act.signal == "loss_spike"
    assert at <= act.onset_step <= at + 2
    assert act.step - act.onset_step == pytest.approx(RULE.heal_steps, abs=1)


@pytest.mark.parametrize("length", [1, 2, 10, 30, 40])
def test_a_spike_that_heals_is_never_acted_on(length: int):
    spiky = with_jump(curve(4000, seed=2), 2000, 3.0, length)
    assert acts(spiky) == []
    alerts = [f for f in findings(spiky) if f.signal == "loss_spike"]
    assert len(alerts) == (1 if length >= RULE.persist else 0)


def test_blooms_spike_is_alerted_before_its_peak_and_healed_by_itself():
    # BLOOM-176B, 2022-04-12 (BigScience chronicles, Apache-2.0): iterations 31214-31222, healed by 31250.
    healthy = [point(step, 2.2 + random.Random(step).gauss(0, 0.01), 0.24) for step in range(31000, 31214)]
    healthy = [replace(p, gnorm=0.24 + random.Random(-p.step).gauss(0, 0.02)) for p in healthy]
    losses = [2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805]
    gnorms = [0.242, 0.947, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0]
    spike = [point(31214 + i, loss, gnorm) for i, (loss, gnorm) in enumerate(zip(losses, gnorms, strict=True))]
    decay = [point(31223 + i, 2.8 - 0.6 * i / 27, 300 * 0.77**i) for i in range(28)]
    after = [point(31251 + i, 2.215, 0.26) for i in range(100)]
    found = findings(healthy + spike + decay + after)
    first = found[0]
    assert (first.signal, first.tier) == ("gradient_norm", Tier.ALERT)
    assert first.step <= 31216, "three steps before the peak at 31219"
    assert [f for f in found if f.tier is Tier.ACT] == []


def test_what_is_not_finite_is_acted_on_at_once():
    for bad in (point(200, None), point(200, 2.0, None)):
        (act,) = acts([*curve(199, seed=3), bad])
        assert (act.signal, act.step, act.onset_step) == ("non_finite_loss", 200, 200)


def test_a_loss_that_ends_as_nan_began_where_it_left_its_band():
    diverging = with_jump(curve(330, seed=4), 300, 2.0, 1000)
    (act,) = acts([*diverging, point(331, None)])
    assert act.signal == "non_finite_loss"
    assert act.onset_step == pytest.approx(300, abs=2)


def test_a_checkpoint_in_trouble_is_not_called_healthy():
    detector = LossDetector(RULE)
    for each in with_jump(curve(600, seed=5), 500, 3.0, 1000):
        detector.observe(each)
    assert detector.why_unhealthy(450) == ""
    assert "loss" in detector.why_unhealthy(520)


def test_a_new_normal_of_the_gradient_norm_is_accepted_in_the_end():
    points = curve(2000, seed=6)
    moved = [replace(p, gnorm=p.gnorm * 5) if p.gnorm is not None and p.step > 1000 else p for p in points]
    detector = LossDetector(RULE)
    for each in moved:
        detector.observe(each)
    assert detector.why_unhealthy(1010) != ""
    assert detector.why_unhealthy(1990) == ""


def test_equal_curves_give_equal_findings():
    spiky = with_jump(curve(1500, seed=7), 900, 2.0, 200)
    assert findings(spiky) == findings(spiky)
    assert findings(spiky) != []


def test_the_robust_window_agrees_with_sorting():
    rng, window, seen = random.Random(0), RobustWindow(50), []
    for _ in range(500):
        seen.append(rng.choice([rng.random(), 0.5, 7.0]))
        window.add(seen[-1])
        last = sorted(seen[-50:])
        assert window.median == last[len(last) // 2]
        assert len(window) == len(last)


def test_patience_is_twice_the_longest_time_of_the_phase():
    usual, rule = UsualTimes(), HangRule(multiple=2, floor_seconds=5, startup_seconds=300)
    assert usual.patience("training", rule) == 300
    for step in range(100):
        usual.observe("training", 60.0 if step == 20 else 20.0)
    assert usual.patience("training", rule) == 40, "the slow step is long ago"
    usual.observe("saving", 1.0)
    assert usual.patience("saving", rule) == 5
    assert usual.patience("evaluation", rule) == 300
