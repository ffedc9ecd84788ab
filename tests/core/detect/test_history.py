"""The history of a curve: after it went back, the detector is the one that never saw what was discarded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.history import CurveHistory
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point


def point(step: int, loss: float) -> Point:
    return Point(
        step=step, ts=float(step), loss=loss, gnorm=None, lr=1e-4, betas=(), weight_decay=0.0, clip_norm=0.0,
        step_seconds=0.0, tokens=0, wps=0.0, finite=True,
    )  # fmt: skip


def quiet(first: int, last: int, seed: int = 1, height: float = 0.0) -> list[Point]:
    noise = random.Random(seed)
    return [point(step, 2.0 + height + noise.gauss(0.0, 0.02)) for step in range(first, last + 1)]


def new() -> LossDetector:
    return LossDetector(SpikeRule())


def findings(history: CurveHistory, points: list[Point]) -> list[Finding]:
    return [finding for each in points for finding in history.observe(each)]


@pytest.mark.parametrize("length", [300, 1500])  # without a copy of the detector, and with two
def test_after_a_restart_the_discarded_points_count_for_nothing(length: int):
    straight, going_back = CurveHistory(new), CurveHistory(new)
    good, bad = quiet(1, length), quiet(length + 1, length + 400, seed=2, height=3.0)
    later = quiet(length + 1, length + 300, seed=3) + quiet(length + 301, length + 500, seed=4, height=1.0)
    findings(straight, good)
    straight.begin_attempt(length)
    findings(going_back, good)
    assert {found.signal for found in findings(going_back, bad)} >= {"loss_spike"}
    going_back.restart(length + 1)
    found = findings(going_back, later)
    assert found == findings(straight, later)
    assert min(finding.onset_step for finding in found if finding.tier == "act") >= length + 290
    assert [each.step for each in going_back.kept] == list(range(1, length + 501))[-4096:]


def test_attempts_that_were_not_discarded_are_learned_as_attempts():
    """Another attempt goes back over a bad restore that nobody stopped: what the restore taught is not forgotten."""
    history = CurveHistory(Told)
    findings(history, quiet(1, 300))
    history.begin_attempt(300)
    findings(history, quiet(301, 600, seed=2, height=2.0))
    history.begin_attempt(550)
    assert isinstance(history.detector, Told)
    assert history.detector.begun == [300, 550]
    history.begin_attempt(300)
    assert isinstance(history.detector, Told)
    assert history.detector.begun == [300]


class Told(LossDetector):
    """Notes what a history tells its detector."""

    def __init__(self) -> None:
        super().__init__(SpikeRule())
        self.plans: list[int] = []
        self.due: list[int] | None = None
        self.begun: list[int] = []
        self.seen = 0

    def observe(self, point: Point) -> list[Finding]:
        self.seen = point.step
        return super().observe(point)

    def plan(self, step: int) -> None:
        self.plans.append(step)
        super().plan(step)

    def begin_attempt(self, due: object) -> None:
        assert isinstance(due, list | tuple)
        self.due = [each.step for each in due]
        self.begun.append(self.seen)
        super().begin_attempt(due)


def test_a_new_attempt_is_told_which_points_are_due_again():
    history = CurveHistory(Told)
    findings(history, quiet(1, 700))
    history.begin_attempt(600)
    assert isinstance(history.detector, Told)
    assert history.detector.due == list(range(601, 701))


def test_a_plan_holds_for_every_copy_and_for_a_detector_that_begins_anew():
    history = CurveHistory(Told)
    findings(history, quiet(1, 1100))
    history.plan(1500)
    history.plan(900)  # of the past: what came since then is learned again
    for at_step in (1000, 600, 0):
        history.begin_attempt(at_step)
        assert isinstance(history.detector, Told)
        assert sorted(history.detector.plans) == [900, 1500]


def test_a_point_that_breaks_the_detector_is_left_out():
    def observed(detector: LossDetector, each: Point) -> list[Finding] | None:
        return None if each.loss == -1.0 else detector.observe(each)

    broken, whole = CurveHistory(new, observed), CurveHistory(new)
    points = quiet(1, 100) + quiet(101, 200, height=3.0)
    for each in points:
        assert broken.observe(replace(each, loss=-1.0)) == []
        assert broken.observe(each) == whole.observe(each)
