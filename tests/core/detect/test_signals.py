"""Detectors on curves: noise is left alone, real trouble is named with its onset."""

import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.hang import HangRule, PhaseTimes
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_scale import LossScaleDetector, LossScaleRule
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.classes import cause
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
    assert at - 8 <= act.onset_step <= at + 2
    assert act.onset_step - act.margin_steps < at
    assert RULE.heal_steps <= act.step - act.onset_step <= 3 * RULE.heal_steps


@pytest.mark.parametrize("length", [1, 2, 10, 30, 40])
def test_a_spike_that_heals_is_never_acted_on(length: int):
    spiky = with_jump(curve(4000, seed=2), 2000, 3.0, length)
    assert acts(spiky) == []
    alerts = [f for f in findings(spiky) if f.signal == "loss_spike"]
    assert len(alerts) == (1 if length >= 4 else 0)


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


def test_gradients_that_overflow_in_fp16_are_left_to_the_loss_scale():
    detector = LossDetector(RULE)
    for each in curve(200, seed=5):
        assert detector.observe(each) == []
    overflow = replace(point(201, 2.3, None), finite=True, loss_scale=4.0, skip="overflow")
    assert detector.observe(overflow) == []
    assert detector.reason_not_healthy(201) == ""
    (act,) = detector.observe(replace(point(202, None), bad_module="forward of layers.3.fc1 (rank 2)"))
    assert (act.signal, act.evidence["bad_module"]) == ("non_finite_loss", "forward of layers.3.fc1 (rank 2)")


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
    assert detector.reason_not_healthy(450) == ""
    assert "loss" in detector.reason_not_healthy(520)


def test_a_new_normal_of_the_gradient_norm_is_accepted_in_the_end():
    points = curve(2000, seed=6)
    moved = [replace(p, gnorm=p.gnorm * 5) if p.gnorm is not None and p.step > 1000 else p for p in points]
    detector = LossDetector(RULE)
    for each in moved:
        detector.observe(each)
    assert detector.reason_not_healthy(1010) != ""
    assert detector.reason_not_healthy(1990) == ""


def raised(points: list[Point], by: float, at: int = 2000) -> list[Point]:
    """The loss rises by so many nats a step from a step on."""
    return [replace(p, loss=p.loss + by * (p.step - at)) if p.loss is not None and p.step > at else p for p in points]


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_a_slow_rise_is_acted_on_once(noise: float):
    act = acts(raised(curve(2800, seed=8, noise=noise), 0.0008))[0]
    assert act.signal in ("loss_drift", "loss_spike")
    assert 1900 <= act.onset_step <= act.step <= 2800
    assert act.onset_step - act.margin_steps <= 2000


def test_a_rise_that_carries_its_band_with_it_is_a_drift_with_its_onset():
    found = findings(raised(curve(2800, seed=9, noise=0.1), 0.0008))[:2]
    assert [(f.signal, f.tier) for f in found] == [("loss_drift", Tier.ALERT), ("loss_drift", Tier.ACT)]
    assert {f.onset_step for f in found} == {found[0].onset_step}
    assert 1900 <= found[0].onset_step <= 2600


def test_a_rise_where_the_learning_rate_was_raised_is_a_change_that_nobody_declared():
    rising = with_jump(curve(4000, seed=10, noise=0.1), 2000, 0.25, 10_000)
    assert [f.signal for f in acts(rising)] == ["loss_drift"]
    (change,) = acts([replace(p, lr=2e-4) if p.step >= 2000 else p for p in rising])
    assert (change.signal, change.evidence["lr"]) == ("undeclared_change", [1e-4, 2e-4])


@pytest.mark.parametrize(("steps", "late"), [(1, 16), (60, 60), (200, 160)])
def test_wrong_data_is_told_and_when_it_stays_a_page_is_asked(steps: int, late: int):
    points = raised(curve(4000, seed=11), -1.1 / steps, at=3000)
    low = [replace(p, loss=max(p.loss, q.loss - 1.1)) for p, q in zip(points, curve(4000, seed=11), strict=True)]
    found = findings(low)
    assert [(f.signal, f.tier) for f in found] == [("loss_too_low", Tier.ALERT), ("loss_too_low", Tier.ACT)]
    assert {f.onset_step for f in found} == {found[0].onset_step}
    assert found[0].onset_step == pytest.approx(3000, abs=late)
    assert found[1].step - found[0].step == 64


@pytest.mark.parametrize("length", [20, 40, 60, 100, 300])
def test_a_loss_that_was_too_low_and_comes_back_is_no_divergence(length: int):
    found = findings(with_jump(curve(4000, seed=11), 3000, -1.1, length))
    paged = [Tier.ACT] if length > 64 else []
    assert {f.signal for f in found} == {"loss_too_low"}
    assert [f.tier for f in found] == [Tier.ALERT, *paged]


def test_a_divergence_after_a_loss_that_was_too_low_is_one():
    points = with_jump(with_jump(curve(4000, seed=11), 3000, -1.1, 60), 3060, 1.0, 10_000)
    act = next(f for f in acts(points) if f.signal != "loss_too_low")
    assert (act.signal, act.onset_step) == ("loss_spike", pytest.approx(3060, abs=4))


def test_a_curve_that_falls_no_more_is_told_once():
    stuck = [replace(p, loss=2.5 + random.Random(p.step).gauss(0, 0.05)) for p in curve(6000, seed=12) if p.step > 800]
    found = findings([*curve(800, seed=12), *stuck])
    assert [(f.signal, f.tier) for f in found] == [("loss_plateau", Tier.ALERT)]


def halving(points: list[Point], at: int, height: float, steps: float) -> list[Point]:
    return [
        replace(p, loss=p.loss + height * 0.5 ** ((p.step - at) / steps)) if p.loss is not None and p.step >= at else p
        for p in points
    ]


def test_a_spike_on_its_way_back_is_waited_for_but_not_for_ever():
    assert acts(halving(curve(4000, seed=13), 2000, 3.0, 30)) == [], "out of the band for 140 steps"
    (act,) = acts(halving(curve(4000, seed=13), 2000, 3.0, 150))
    assert act.step - act.onset_step >= RULE.heal_steps


@pytest.mark.parametrize("every", [1, 5, 20])
def test_a_curve_that_is_logged_now_and_then(every: int):
    points = curve(4000 * every, seed=14)[::every]
    assert acts(points) == []
    (act,) = acts(with_jump(points, 2000 * every, 2.0, 10**6))
    assert abs(act.onset_step - 2000 * every) <= 4 * every
    assert act.onset_step - act.margin_steps < 2000 * every
    assert act.step - act.onset_step <= max(3 * RULE.heal_steps, 40 * every)


def test_clipped_gradient_norms_without_any_spread_are_left_alone():
    rising = {300: 1.01, 301: 1.02}
    assert findings([replace(p, gnorm=rising.get(p.step, 1.0)) for p in curve(500, seed=15)]) == []


def test_a_loss_that_is_out_of_its_band_less_than_half_of_the_time_is_left_alone():
    restless = [
        replace(p, loss=p.loss + 1.0) if p.loss and p.step >= 1000 and p.step % 7 < 3 else p
        for p in curve(1500, seed=17)
    ]
    assert {f.tier for f in findings(restless)} == {Tier.ALERT}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.floats(0.5, 20), length=st.integers(1, 45), at=st.integers(200, 500))
def test_whatever_heals_in_time_never_acts(seed: int, height: float, length: int, at: int):
    assert acts(with_jump(curve(900, seed), at, height, length)) == []


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.floats(1, 5), factor=st.floats(1, 10))
def test_a_larger_divergence_is_seen_no_later(seed: int, height: float, factor: float):
    points = curve(1200, seed)
    (small,), (large,) = (acts(with_jump(points, 800, h, 10_000)) for h in (height, height * factor))
    assert large.step <= small.step + 2


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), offset=st.floats(-2, 20), factor=st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_neither_an_offset_of_the_loss_nor_the_unit_of_the_gradient_norm_matters(
    seed: int, offset: float, factor: float
):
    points = raised(with_jump(curve(1200, seed), 500, 1.0, 20), 0.01, at=800)
    points = [replace(p, loss=round(p.loss * 2**30) / 2**30) for p in points if p.loss is not None]
    offset = round(offset * 2**30) / 2**30  # sums without rounding
    moved = [replace(p, loss=p.loss + offset, gnorm=p.gnorm * factor) for p in points if p.loss and p.gnorm]
    assert [(f.signal, f.tier, f.step, f.onset_step) for f in findings(points)] == [
        (f.signal, f.tier, f.step, f.onset_step) for f in findings(moved)
    ]


def test_memory_does_not_grow_with_the_curve():
    detector, sizes = LossDetector(RULE), []
    for each in with_jump(curve(12_000, seed=16), 5000, 2.0, 30):
        detector.observe(each)
        if each.step in (3000, 6000, 12_000):
            sizes.append(held(detector))
    assert max(sizes) <= 2500
    assert sizes[2] <= sizes[1] + 10


def held(thing: object) -> int:
    """How many values an object holds on to."""
    if isinstance(thing, deque | list | tuple):
        return sum(held(each) for each in thing)
    if isinstance(thing, LossDetector | RobustWindow) or type(thing).__name__.endswith("Detector"):
        return sum(held(each) for each in vars(thing).values())
    return 1


def mixed(points: list[Point], share: float, height: float, seed: int = 0, stay: float = 0.0) -> list[Point]:
    """Losses of two kinds of data in turn: so many are higher, alone or, with `stay`, in blocks."""
    rng, high, out = random.Random(seed), False, []
    for each in points:
        high = rng.random() < (stay if high and stay else share)
        out.append(replace(each, loss=each.loss + height * high))
    return out


@pytest.mark.parametrize(("share", "stay"), [(0.03, 0.0), (0.15, 0.0), (0.3, 0.0), (0.05, 0.9)])
def test_two_kinds_of_data_in_turn_are_told_a_few_times_at_most(share: float, stay: float):
    found = findings(mixed(curve(6000, seed=18, noise=0.04), share, 0.8 if not stay else 0.5, stay=stay))
    assert len([f for f in found if f.signal == "loss_spike"]) <= 8, "so often it has to be learned"
    assert [f for f in found if f.signal == "loss_spike" and f.tier is Tier.ACT] == []


@pytest.mark.parametrize(("share", "height"), [(0.03, 1.0), (0.15, 2.0)])
def test_a_divergence_of_mixed_losses_is_still_one(share: float, height: float):
    points = mixed(curve(6000, seed=19, noise=0.04), share, 0.8)
    (act,) = acts(with_jump(points, 4000, height, 10_000))
    assert act.onset_step == pytest.approx(4000, abs=16)


def test_four_points_far_above_the_best_level_are_told():
    (alert,) = [f for f in findings(with_jump(curve(4000, seed=2), 2000, 3.0, 20)) if f.signal == "loss_spike"]
    assert (alert.onset_step, alert.step) == (2000, 2003)


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
    usual, rule = PhaseTimes(), HangRule(multiple=2, floor_seconds=5, startup_seconds=300)
    assert usual.timeout("training", rule) == 300
    for step in range(100):
        usual.observe("training", 60.0 if step == 20 else 20.0)
    assert usual.timeout("training", rule) == 40, "the slow step is long ago"
    usual.observe("saving", 1.0)
    assert usual.timeout("saving", rule) == 5
    assert usual.timeout("evaluation", rule) == 300


def test_incidents_can_say_what_every_finding_that_acts_is_about():
    points = curve(2000, seed=21, noise=0.02)
    scaled = [replace(p, loss_scale=2.0**-5) for p in points[:200]]
    curves = {
        "loss_spike": with_jump(points, 1500, 2.0, 10_000),
        "loss_drift": raised(points, 0.0008, at=1500),
        "loss_too_low": with_jump(points, 1500, -0.5, 10_000),
        "undeclared_change": [
            replace(p, batch=64 if p.step < 1500 else 16) for p in with_jump(points, 1500, 0.5, 10_000)
        ],
        "non_finite_loss": [*points, point(2001, None)],
    }
    for name, each in curves.items():
        act = acts(each)[0]
        assert act.signal == name
        assert str(act.step) in said(act) or act.rule in said(act)
    scale = LossScaleDetector(LossScaleRule())
    (act,) = [f for each in scaled for f in scale.observe(each) if f.tier is Tier.ACT]
    assert "loss scale" in said(act)


def said(finding: Finding) -> str:
    return cause(
        SignalRaised(
            signal=finding.signal,
            tier=finding.tier,
            attempt="1.00-a0",
            step=finding.step,
            onset_step=finding.onset_step,
            at=finding.at,
            rule=finding.rule,
            evidence=finding.evidence,
        )
    )
