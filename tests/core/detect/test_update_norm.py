"""Norms of updates that grow are reported by block; what they do in healthy training is not."""

import math
import pickle
import random
from collections.abc import Callable, Iterator

import pytest

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.update_norm import UpdateNormDetector
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier

EVERY = 10
BLOCKS = ("embed_tokens", "layers.0", "layers.1", "layers.2")
USUAL = 25.0  # of the norm of an update / its learning rate


def point(step: int, lr: float, unorms: dict[str, float] | None) -> Point:
    return Point(
        step=step,
        ts=float(step),
        loss=3.0,
        gnorm=1.0,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip_norm=1.0,
        step_seconds=1.0,
        tokens=step,
        wps=1.0,
        finite=True,
        block_unorms=unorms,
    )


def training(
    steps: int,
    lr: Callable[[int], float] = lambda step: 1e-3,
    factor: Callable[[int, str], float] = lambda step, block: 1.0,
    noise: float = 0.1,
    seed: int = 1,
) -> Iterator[Point]:
    """Telemetry with norms every tenth step. A line has those of the update before it. `factor`: times the usual."""
    dice = random.Random(seed)
    for step in range(1, steps + 1):
        unorms = None
        if step % EVERY == 0:
            unorms = {
                block: USUAL * lr(step - 1) * factor(step - 1, block) * math.exp(dice.gauss(0, noise))
                for block in BLOCKS
            }
        yield point(step, lr(step), unorms)


def found(points: Iterator[Point]) -> list[Finding]:
    detector = UpdateNormDetector()
    return [finding for each in points for finding in detector.observe(each)]


@pytest.mark.parametrize("seed", range(5))
def test_a_block_whose_updates_grow_is_named(seed: int) -> None:
    def factor(step: int, block: str) -> float:
        return 2.0 if step >= 2000 and block == "layers.1" else 1.0

    findings = found(training(2500, factor=factor, seed=seed))
    (finding,) = findings[:1]
    assert (finding.signal, finding.tier) == (AlertSignal.UPDATE_NORM, Tier.ALERT)
    assert finding.evidence["block"] == "layers.1"
    assert finding.evidence["times_usual"] == pytest.approx(2.0, rel=0.5)
    assert 2000 <= finding.step <= 2000 + 15 * EVERY
    assert abs(finding.onset_step - 2000) <= 3 * EVERY


@pytest.mark.parametrize("speed", [1.005, 1.02])
def test_growth_that_begins_slowly_is_found_too(speed: float) -> None:
    findings = found(training(3000, factor=lambda step, block: min(30.0, speed ** max(0, step - 2000))))
    assert findings
    assert 2000 < findings[0].step < 2300


def healthy_schedule(step: int) -> float:
    return 1e-3 * min(step / 500, 0.1 + 0.9 * (1 - min(step, 9000) / 9000))


@pytest.mark.parametrize(
    "factor",
    [
        lambda step, block: 1.0,
        lambda step, block: 1 + step / 5000,
        lambda step, block: 1 + 3 / (1 + step / 100),
        lambda step, block: 4.0 if step in (3009, 5009) else 1.0,
        lambda step, block: 1.3 if step % 400 < 40 else 1.0,
    ],
    ids=["warm-up and decay", "slow growth", "the first updates are larger", "single outliers", "a rhythm"],
)
@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_what_healthy_training_does_is_not_told(factor: Callable[[int, str], float], noise: float) -> None:
    assert found(training(6_000, healthy_schedule, factor, noise)) == []


def test_a_learning_rate_above_the_peak_of_its_warm_up_explains_nothing() -> None:
    def climbing(step: int) -> float:
        return healthy_schedule(step) * (1.02 ** (step - 4000) if step > 4000 else 1.0)

    findings = found(training(4400, climbing))
    assert findings
    assert findings[0].step > 4000
    assert found(training(4400, lambda step: 1e-6 * 1.0015**step)) == [], "a warm-up, however long"


def test_an_attempt_that_resumes_in_the_decay_learns_from_there() -> None:
    points = (each for each in training(9000, healthy_schedule) if each.step > 5000)
    assert found(points) == []


def test_trouble_is_told_once_and_what_stays_becomes_usual() -> None:
    findings = found(training(8_000, factor=lambda step, block: 2.0 if step >= 2000 else 1.0))
    assert len(findings) == 1


def test_memory_does_not_grow() -> None:
    detector, sizes = UpdateNormDetector(), []
    for each in training(8_000):
        detector.observe(each)
        if each.step in (4_000, 8_000):
            sizes.append(len(pickle.dumps(detector)))
    assert sizes[1] < 1.1 * sizes[0]


def test_lines_without_norms_or_with_odd_ones_are_passed_over() -> None:
    detector = UpdateNormDetector()
    for step in range(1, 400):
        assert detector.observe(point(step, 0.0, {"a": 1.0})) == []
        assert detector.observe(point(step, 1e-3, {"a": 0.0})) == []
        assert detector.observe(point(step, 1e-3, {})) == []
        assert detector.observe(point(step, 1e-3, None)) == []
