"""The learning rate read back against the plan: told at the first update that is off, once, and never on a plan."""

from dataclasses import replace

import pytest

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.unplanned_lr import LearningRateDetector
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.schedule import PlannedLr, expected_lr
from opt_ops.core.values import LrFactor, Schedule, Tier
from tests.core.detect.test_signals import point

SCHEDULE = Schedule(peak_lr=6e-4, warmup_steps=100, total_steps=1000, final_fraction=0.0)
FACTORS = (LrFactor(step=300, factor=0.75),)
PLAN = PlannedLr(schedule=SCHEDULE, factors=FACTORS)


def at(step: int, lr: float | None = None) -> Point:
    planned = expected_lr(SCHEDULE, FACTORS, step)
    return replace(point(step, 3.0), lr=planned if lr is None else lr)


def found(detector: LearningRateDetector, *points: Point) -> list[Finding]:
    return [finding for each in points for finding in detector.observe(each)]


def begun(plan: PlannedLr | None = PLAN, start: int = 0) -> LearningRateDetector:
    detector = LearningRateDetector()
    detector.begin(plan, start)
    return detector


def test_a_whole_run_on_its_plan_is_silent_also_after_its_end_and_where_updates_are_skipped():
    skipped = (replace(at(step), skip="overflow" if step % 7 == 0 else None) for step in range(1, 1200))
    assert found(begun(), *skipped) == []


@pytest.mark.parametrize("digits", [5, 7])
def test_a_rounded_readback_is_the_planned_one(digits: int):
    points = (at(step, float(f"{expected_lr(SCHEDULE, FACTORS, step):.{digits - 1}e}")) for step in range(1, 990))
    assert found(begun(), *points) == []


@pytest.mark.parametrize(
    "factor",
    [
        1.001,
        0.5,
        40.0,
        0.0,
    ],
)
def test_the_first_update_that_is_off_is_told_once(factor: float):
    off = (at(step, factor * expected_lr(SCHEDULE, FACTORS, step)) for step in range(500, 520))
    (finding,) = found(begun(), *map(at, range(1, 500)), *off)
    assert (finding.signal, finding.tier) == (FailureClass.UNPLANNED_LR, Tier.ACT)
    assert (finding.step, finding.onset_step, finding.margin_steps) == (500, 500, 1)
    assert finding.evidence["planned_lr"] == expected_lr(SCHEDULE, FACTORS, 500)


def test_a_decay_that_stands_still_is_told_when_it_is_a_ten_thousandth_off():
    stuck = expected_lr(SCHEDULE, FACTORS, 400)
    (finding,) = found(begun(), *map(at, range(1, 401)), *(at(step, stuck) for step in range(401, 440)))
    assert finding.onset_step == 401


def test_the_margin_reaches_back_to_the_last_line_that_was_as_planned():
    (finding,) = found(begun(), *map(at, range(30, 301, 30)), at(330, 1e-3))
    assert (finding.onset_step, finding.margin_steps) == (330, 30)


def test_the_first_update_of_a_later_attempt_is_checked_too():
    detector = begun()
    assert found(detector, *map(at, range(1, 200))) == []
    detector.begin(PLAN, 150)
    (finding,) = found(detector, at(151, 6e-5), at(152, 6e-5))
    assert (finding.tier, finding.onset_step, finding.margin_steps) == (Tier.ACT, 151, 1)
    detector.begin(PLAN, 150)
    assert found(detector, *map(at, range(151, 200))) == []


def test_factors_of_another_run_are_another_plan():
    detector = begun()
    assert found(detector, *map(at, range(1, 200))) == []
    detector.begin(PlannedLr(schedule=SCHEDULE, factors=(LrFactor(step=100, factor=0.5),)), 100)
    halved = [at(step, 0.5 * expected_lr(SCHEDULE, (), step)) for step in range(101, 150)]
    assert found(detector, *halved) == []
    assert [f.onset_step for f in found(detector, at(150))] == [150], "the old rate is not the planned one any more"


def test_a_trainer_that_never_followed_the_plan_is_told_of_without_action():
    (finding,) = found(begun(), *(at(step, 1e-3) for step in range(1, 50)))
    assert finding.tier is Tier.ALERT


def test_without_a_known_plan_nothing_is_said():
    greedy = PlannedLr(schedule=replace(SCHEDULE, kind="greedy"))
    for plan in (None, greedy):
        assert found(begun(plan), *(at(step, 1e-3 / step) for step in range(1, 50))) == []


COSINE = PlannedLr(schedule=replace(SCHEDULE, kind="cosine", delay=1), factors=FACTORS)


def test_a_cosine_is_followed_and_told_when_it_is_left():
    planned = [at(step, COSINE.at(step)) for step in range(1, 1001)]
    assert found(begun(COSINE), *planned) == []
    (finding,) = found(begun(COSINE), *planned[:500], replace(planned[500], lr=1.01 * planned[500].lr))
    assert (finding.tier, finding.onset_step) == (Tier.ACT, 501)


def test_of_an_unknown_kind_the_ratio_to_what_the_schedule_gave_is_followed():
    plan = PlannedLr(schedule=Schedule(kind="greedy"), factors=FACTORS)
    points = [
        replace(at(step, 1e-3 / step * (0.75 if step > 300 else 1.0)), base_lr=1e-3 / step) for step in range(1, 400)
    ]
    assert found(begun(plan), *points) == []
    (finding,) = found(begun(plan), *points[:350], replace(points[350], lr=points[350].base_lr))
    assert (finding.tier, finding.onset_step) == (Tier.ACT, 351)
    assert finding.evidence["planned_lr"] == pytest.approx(0.75e-3 / 351)
    at_zero = [replace(at(step, 0.0), base_lr=0.0) for step in range(1, 9)]
    (finding,) = found(begun(plan), *at_zero, replace(at(9, 1e-3), base_lr=5e-4))
    assert finding.tier is Tier.ALERT, "nothing was ever followed but zero"
