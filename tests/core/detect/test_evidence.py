"""The loss detectors' evidence: what rises little, what was planned, what changed visibly, and how attempts begin."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_level import DriftRule, Level
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.values import Tier
from tests.core.detect.test_signals import acts, findings, point, with_jump


def late(
    points: int, seed: int, noise: float = 0.01, every: int = 1, gnorm: bool = True, lr: float = 1e-4
) -> list[Point]:
    """A healthy run far from its beginning: it falls by 0.01 nats in a thousand points."""
    rng = random.Random(seed)
    return [
        replace(
            point(20_000 + n * every, 2.5 - 1e-5 * n + rng.gauss(0, noise), 0.3 * rng.lognormvariate(0, 0.1)),
            lr=lr,
            **({} if gnorm else {"gnorm": None}),
        )
        for n in range(points)
    ]


def changed(points: list[Point], at: int, shape: Callable[[int], float], **fields: Any) -> list[Point]:
    """From the n-th point on, the loss is higher by `shape`, and fields have other values."""
    return points[:at] + [replace(p, loss=(p.loss or 0.0) + shape(n), **fields) for n, p in enumerate(points[at:])]


def rollbacks(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.tier is Tier.ACT and f.signal in ("loss_spike", "loss_drift", "bad_restore")]


@pytest.mark.parametrize("noise", [0.005, 0.01, 0.1])
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("gnorm", [True, False])
def test_a_rise_of_five_sd_for_good_is_acted_on_in_any_unit_and_at_any_logging_rate(
    noise: float, every: int, gnorm: bool
):
    points = late(1500, 1, noise, every, gnorm)
    (act,) = rollbacks(findings(changed(points, 800, lambda _: 5 * noise)))[:1]
    assert act.step - points[800].step <= 250 * every
    assert act.onset_step - act.margin_steps < points[800].step


@pytest.mark.parametrize("seed", range(4))
def test_a_drift_of_a_few_hundredths_is_told_well_before_it_is_acted_on(seed: int):
    found = findings(changed(late(1500, seed), 800, lambda n: min(0.05, 0.05 * n / 250)))
    told, act = (next(f for f in found if f.tier is tier) for tier in (Tier.ALERT, Tier.ACT))
    assert told.step + 15 <= act.step <= 20_800 + 400
    assert act.onset_step - act.margin_steps < 20_800


@pytest.mark.parametrize("seed", range(8))
def test_a_blow_up_over_some_points_did_not_begin_hundreds_of_steps_before(seed: int):
    """By chance, the level may have been at its best for the last time hundreds of steps before."""
    points = changed(late(1500, seed, noise=0.02), 1300, lambda n: 3.0 * (1 - 0.05 ** ((n + 1) / 40)), gnorm=1.2)
    (act,) = rollbacks(findings(points))
    assert act.margin_steps <= 100
    assert act.onset_step - act.margin_steps < points[1300].step


def test_a_blow_up_right_after_a_planned_change_did_not_begin_at_step_0():
    points = changed(late(1500, 1, noise=0.02), 1309, lambda n: 3.0 * (1 - 0.05 ** ((n + 1) / 40)), gnorm=1.2)
    detector = LossDetector(SpikeRule())
    detector.plan(points[1300].step)
    (act,) = rollbacks([found for each in points for found in detector.observe(each)])
    assert points[1300].step - 100 <= act.onset_step - act.margin_steps < points[1309].step


def test_a_level_that_is_learned_anew_was_not_at_its_best_at_step_0():
    level = Level(DriftRule())
    level.observe(point(46_345, 2.1), 2.1, None, calm=True)
    assert level.low_step == 46_345


@pytest.mark.parametrize("seed", range(4))
def test_a_rise_that_says_little_is_plain_together_with_the_gradient_norm(seed: int):
    little = changed(late(1100, seed), 800, lambda _: 0.007)
    assert rollbacks(findings(little)) == []
    norm = [replace(p, gnorm=3 * (p.gnorm or 0.0)) if n >= 800 else p for n, p in enumerate(late(1100, seed))]
    assert rollbacks(findings(norm)) == [], "the norm alone never acts"
    both = [replace(p, gnorm=q.gnorm) for p, q in zip(changed(late(1600, seed), 800, lambda _: 0.011), [
        replace(p, gnorm=3 * (p.gnorm or 0.0)) if n >= 800 else p for n, p in enumerate(late(1600, seed))
    ], strict=True)]  # fmt: skip
    assert rollbacks(findings(both)) != []


@pytest.mark.parametrize("every", [1, 5, 50])
@pytest.mark.parametrize("back", [100, 180])
def test_a_slow_healer_is_waited_for(every: int, back: int):
    healing = changed(late(1600, 2, 0.02, every), 800, lambda n: 1.5 * max(0.0, 1 - n / back))
    found = findings(healing)
    assert [f.signal for f in found if f.signal == "loss_spike"] == ["loss_spike"]
    assert rollbacks(found) == []


@pytest.mark.parametrize("early", [True, False])
def test_what_was_planned_is_no_fault_and_what_comes_after_it_is_one(early: bool):
    points = changed(late(1800, 3), 800, lambda _: 0.4)
    points = changed(points, 1100, lambda _: 0.1)
    detector, found = LossDetector(SpikeRule()), []
    if early:
        detector.plan(points[800].step)
    for n, each in enumerate(points):
        found += detector.observe(each)
        if n == 830 and not early:
            detector.plan(points[800].step)
    (act,) = rollbacks(found)
    assert points[1050].step <= act.onset_step <= points[1101].step


@pytest.mark.parametrize(
    ("before", "after"),
    [({"batch": 512}, {"batch": 128}), ({"stage": "web"}, {"stage": "code"}), ({}, {"lr": 1e-5}), ({}, {"lr": 3e-4})],
)
def test_a_visible_change_is_told_to_people_and_nothing_is_rolled_back(before: dict[str, Any], after: dict[str, Any]):
    points = [replace(p, **before) for p in late(1500, 4)]
    found = findings(changed(points, 800, lambda n: 0.5 * 0.5 ** (n / 400), **after))
    (change,) = [f for f in found if f.tier is Tier.ACT]
    assert (change.signal, set(after) <= set(change.evidence)) == ("undeclared_change", True)


def test_a_learning_rate_that_was_raised_excuses_no_blow_up():
    points = changed(late(1500, 5), 800, lambda n: min(6.0, 0.005 * 2 ** (n / 10)), lr=1e-3)
    found = findings(points)
    assert found[0].signal == "unplanned_lr"
    assert found[0].step == points[800].step
    assert [f.signal for f in rollbacks(found)][:1] in (["loss_drift"], ["loss_spike"])


def schedule(kind: str, n: int) -> float:
    match kind:
        case "linear":
            return 3e-4 * min(1.0, (n + 1) / 50) * (1 - n / 1200)
        case "constant":
            return 3e-4 * min(1.0, (n + 1) / 50)
        case "sharp":
            return 3e-4 * min(1.0, (n + 1) / 50, (1200 - n) / 120)
        case _:
            return 3e-4 * min((n + 1) / 50, (50 / (n + 1)) ** 0.5)


@pytest.mark.parametrize("kind", ["linear", "constant", "sharp", "inverse root"])
@pytest.mark.parametrize("digits", [3, 12])
def test_schedules_are_on_their_path(kind: str, digits: int):
    points = [replace(p, lr=float(f"{schedule(kind, n):.{digits}g}")) for n, p in enumerate(late(1200, 6))]
    assert [f for f in findings(points) if f.signal == "unplanned_lr"] == []


@pytest.mark.parametrize(
    "leaves",
    [
        lambda lr, n: lr * (3 if n >= 600 else 1),
        lambda lr, n: lr * (0.3 if n >= 600 else 1),
        lambda lr, n: schedule("linear", min(n, 600)),
        lambda lr, n: lr * (1 + max(0, n - 600) / 200),
        lambda lr, n: 0.0 if n >= 600 else lr,
        lambda lr, n: lr if n < 600 else schedule("linear", n - 600),
    ],
)
def test_a_learning_rate_that_leaves_its_path_is_told(leaves: Callable[[float, int], float]):
    points = [replace(p, lr=leaves(schedule("linear", n), n)) for n, p in enumerate(late(1200, 7))]
    first = next(f for f in findings(points) if f.signal == "unplanned_lr")
    assert points[600].step <= first.step <= points[640].step


def resumed(height: Callable[[int], float], seed: int, due: bool = True) -> list[Finding]:
    """An attempt that begins at the 600th point of a run that had come to the 700th."""
    kept, after = late(700, seed), late(1000, seed + 100)[600:]
    detector = LossDetector(SpikeRule())
    for each in kept[:600]:
        detector.observe(each)
    detector.begin_attempt(kept[600:] if due else ())
    return [f for each in changed(after, 0, height) for f in detector.observe(each)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("due", [True, False])
def test_an_attempt_that_does_not_continue_the_loss_is_a_bad_restore(seed: int, due: bool):
    bad = {
        "other weights": lambda _: 0.3,
        "fresh weights": lambda n: 8.0 * 0.5 ** (n / 300),
        "seen data": lambda _: -0.2,
        "no moments": lambda n: 0.0 if n < 10 else 0.4,
    }
    for name, height in bad.items():
        found = [f for f in resumed(height, seed, due) if f.tier is Tier.ACT]
        assert found[0].signal == "bad_restore", name
        assert found[0].onset_step in range(20_600, 20_612), name
        assert found[0].step <= 20_600 + (16 if name != "no moments" else 120), name


@pytest.mark.parametrize("seed", range(8))
def test_a_good_restore_is_left_alone(seed: int):
    for height in (lambda _: 0.0, lambda n: 0.06 * 0.5 ** (n / 5), lambda n: 0.01 * (n % 3)):
        assert [f for f in resumed(height, seed) if f.tier is Tier.ACT] == []


def test_a_tail_that_is_not_finite_is_one_finding():
    tail = [point(n, None) for n in range(20_500, 21_500)]
    assert [f.signal for f in findings(late(500, 8) + tail)] == ["non_finite_loss"]


def test_a_run_that_broke_before_it_had_learned_much_is_told_however_seldom_it_is_logged():
    for every in (1, 100):
        rng = random.Random(every)
        losses = [10.8 - 0.15 * n if n < 20 else 10.4 for n in range(200)]
        points = [point(1 + n * every, loss + rng.gauss(0, 0.03)) for n, loss in enumerate(losses)]
        assert acts(points)[0].step <= 1 + 150 * every


def test_the_state_after_the_onset_is_not_gone_back_to():
    detector = LossDetector(SpikeRule())
    for each in with_jump(late(1000, 9), 20_800, 0.3, 10_000):
        detector.observe(each)
    assert detector.reason_not_healthy(20_790) == ""
    assert detector.reason_not_healthy(20_805) != ""
