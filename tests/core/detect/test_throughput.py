"""Slow ranks, loss scales at their floor, saves that fail."""

from dataclasses import replace

import pytest

from opt_ops.core.detect.activations import ActivationDetector
from opt_ops.core.detect.corruption import CorruptionDetector
from opt_ops.core.detect.loss_scale import LossScaleDetector, LossScaleRule
from opt_ops.core.detect.point import Busy, ChecksumComparison, Point
from opt_ops.core.detect.saves import SaveDetector
from opt_ops.core.detect.straggler import StragglerDetector, StragglerRule
from opt_ops.core.detect.throughput import ThroughputDetector, ThroughputRule, slow_node
from opt_ops.core.health.findings import SLOWING
from opt_ops.core.values import Tier

POINT = Point(
    step=1,
    ts=1.0,
    loss=3.0,
    gnorm=0.3,
    lr=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    clip_norm=1.0,
    step_seconds=1.0,
    tokens=1,
    wps=1.0,
    finite=True,
)


def at(step: int, **fields: object) -> Point:
    return replace(POINT, step=step, ts=float(step), **fields)


def slow(rank: int, ratio: float = 2.0) -> Busy:
    return Busy(median=1.0, max=ratio, rank=rank)


def test_a_rank_that_is_slow_step_after_step_is_named_once():
    detector = StragglerDetector(StragglerRule(ratio=1.3, persist=10))
    found = [f for step in range(1, 40) for f in detector.observe(at(step, busy=slow(5)))]
    assert [(f.signal, f.step, f.onset_step, f.evidence["rank"]) for f in found] == [("straggler", 10, 1, 5)]


def test_turns_among_ranks_are_no_straggler():
    detector = StragglerDetector(StragglerRule(ratio=1.3, persist=10))
    assert [f for step in range(1, 200) for f in detector.observe(at(step, busy=slow(step // 9)))] == []


def test_a_small_difference_is_no_straggler():
    detector = StragglerDetector(StragglerRule(ratio=1.3, persist=10))
    assert [f for step in range(1, 200) for f in detector.observe(at(step, busy=slow(5, 1.29)))] == []


@pytest.mark.parametrize("floor", [2.0**-5, 2.0**-3, 1.0])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_loss_scale_that_recovers_no_more_whatever_its_floor(floor: float, every: int):
    detector, scale, found = LossScaleDetector(LossScaleRule()), 65536.0, []
    for step in range(1, 800):
        over = step >= 400 and step % every == 0
        found += detector.observe(at(step, loss_scale=scale, skip="overflow" if over else None))
        scale = max(floor, scale / 2) if over else scale
    act = [f for f in found if f.tier is Tier.ACT]
    assert [(f.signal, f.onset_step) for f in act] == [("loss_scale_floor", 400)]
    assert act[0].step <= 400 + 32 * every


def test_a_loss_scale_that_is_halved_now_and_then_or_comes_back_is_left_alone():
    detector = LossScaleDetector(LossScaleRule())
    dip = [2.0 ** (16 - min(n, 9)) for n in range(60)] + [2.0**k for k in range(8, 17) for _ in range(60)]
    seldom = [2.0 ** (16 - n % 2) for n in range(40) for _ in range(500)]
    lines = enumerate([*seldom, *dip, *seldom], 1)
    found = [f for step, scale in lines for f in detector.observe(at(step, loss_scale=scale))]
    assert [f for f in found if f.tier is Tier.ACT] == []


def test_bf16_has_no_loss_scale():
    detector = LossScaleDetector(LossScaleRule())
    assert detector.observe(at(1, loss_scale=None)) == []


def test_failing_saves_are_told_once_until_one_succeeds():
    detector = SaveDetector()
    lines = [
        at(10, save_error="No space left"),
        at(11),
        at(20, save_error="No space left"),
        at(30, save_seconds=0.5),
        at(40, save_error="again"),
    ]
    found = [f for line in lines for f in detector.observe(line)]
    assert [(f.step, f.tier) for f in found] == [(10, Tier.ALERT), (40, Tier.ALERT)]


def test_a_loss_scale_that_falls_is_told_before_it_is_at_its_floor():
    # BigScience 104B, iterations 17060-17068: 2^20 to 2^15 within seven (chronicles, Apache-2.0).
    healthy = [2.0**19 if step % 1000 < 500 else 2.0**20 for step in range(17060 - 2000, 17060)]
    scales = [*healthy, 2.0**20, 2.0**20, 2.0**20, 2.0**19, 2.0**18, 2.0**17, 2.0**17, 2.0**16, 2.0**15]
    detector = LossScaleDetector(LossScaleRule())
    found = [f for step, scale in enumerate(scales, 15060) for f in detector.observe(at(step, loss_scale=scale))]
    assert [(f.signal, f.tier, f.step, f.onset_step) for f in found] == [
        ("loss_scale_falling", Tier.ALERT, 17067, 17062)
    ]


def test_a_run_that_looks_for_its_loss_scale_is_left_alone():
    detector = LossScaleDetector(LossScaleRule())
    assert [f for step in range(100) for f in detector.observe(at(step, loss_scale=2.0 ** max(8, 32 - step)))] == []


NODES = ("n1", "n2", "n3")


@pytest.mark.parametrize(
    ("slowest", "readings", "node", "why"),
    [
        ({"2": 20, "3": 8}, {}, "n2", "whose ranks were the slowest in 28 of 32 steps"),
        ({"2": 28}, {"n2": "hw_slowdown", "n3": "too_hot"}, "n2", "28 of 32 steps, and its reading says hw_slowdown"),
        ({"2": 12, "4": 12}, {"n3": "pcie_width", "n1": "ok"}, "n3", "whose reading says pcie_width"),
        ({}, {"n1": "power_brake"}, "n1", "whose reading says power_brake"),
        ({}, {"n1": "power_brake", "n3": "too_hot"}, None, ""),
        ({"2": 23}, {"n2": "ecc_corrected"}, None, ""),
    ],
)
def test_the_node_behind_a_drop(slowest: dict[str, int], readings: dict[str, str], node: str | None, why: str):
    slowing = {node: reason for node, reason in readings.items() if reason in SLOWING}
    found = slow_node({"slowest": slowest, "points": 32}, NODES, 2, slowing, share=0.75)
    assert (found[0] if found else None) == node
    assert why in (found[1] if found else "")


def test_ranks_that_differ_name_themselves_and_the_step_until_which_all_agreed():
    detector = CorruptionDetector(agreed=1)
    lines = [
        at(1),
        at(101, checksums=ChecksumComparison()),
        at(102),
        at(201, checksums=ChecksumComparison((3,), True, "its own shards")),
    ]
    (found,) = [f for line in lines for f in detector.observe(line)]
    assert (found.signal, found.tier, found.step, found.onset_step) == ("silent_data_corruption", Tier.ACT, 201, 101)
    assert found.evidence == {"ranks": [3], "certain": True, "what": "its own shards"}


def test_a_lasting_loss_of_throughput_is_told_once_with_its_onset():
    rule = ThroughputRule()
    detector = ThroughputDetector(rule)
    lines = [
        at(step, wps=(100.0 if step < 200 else 75.0) + step % 5 - (60 if step % 50 == 0 else 0)) for step in range(400)
    ]
    found = [f for line in lines for f in detector.observe(line)]
    assert {(f.signal, f.tier, f.onset_step) for f in found} == {("throughput_drop", Tier.ALERT, found[0].onset_step)}
    assert 200 <= found[0].onset_step <= 200 + rule.width
    assert found[1].step - found[0].step == rule.width, "asked again, for a reading that comes later"
    assert found[0].evidence["slowest"] == {}, "nobody says who is slow"
    quiet = ThroughputDetector(rule)
    assert [f for step in range(400) for f in quiet.observe(at(step, wps=100.0 - (60 if step % 8 == 0 else 0)))] == []


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_activations_that_grow_faster_than_they_ever_did(scale: float):
    def norm(step: int) -> float:
        slow = 5 + step / 1000
        return scale * (slow if step < 5000 else slow * 1.003 ** (step - 5000))

    detector = ActivationDetector()
    found = [f for step in range(5300) for f in detector.observe(at(step, actv_norm=norm(step)))]
    assert [f.signal for f in found] == ["activation_norm"]
    assert 4400 <= found[0].onset_step <= 5000 + ActivationDetector.WIDTH
