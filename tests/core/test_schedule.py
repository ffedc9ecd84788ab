"""The learning rate that the proof expects."""

import pytest

from opt_ops.core.schedule import expected_lr, scheduled_lr
from opt_ops.core.values import LrFactor, Schedule

SCHEDULE = Schedule(peak_lr=6e-4, warmup_steps=100, total_steps=1100, final_fraction=0.1)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(1, 6e-6), (50, 3e-4), (100, 6e-4), (600, 6e-4 * 0.55), (1100, 6e-5), (5000, 6e-5)],
)
def test_warm_up_then_decay_to_a_tenth(step: int, lr: float):
    assert scheduled_lr(SCHEDULE, step) == pytest.approx(lr, rel=1e-12)


def test_a_factor_begins_with_the_update_after_its_step():
    factors = [LrFactor(step=600, factor=0.75), LrFactor(step=700, factor=0.5)]
    assert expected_lr(SCHEDULE, factors, 600) == scheduled_lr(SCHEDULE, 600)
    assert expected_lr(SCHEDULE, factors, 601) == scheduled_lr(SCHEDULE, 601) * 0.75
    assert expected_lr(SCHEDULE, factors, 701) == scheduled_lr(SCHEDULE, 701) * 0.75 * 0.5


def test_a_run_without_warm_up_or_decay():
    flat = Schedule(peak_lr=1e-3, warmup_steps=0, total_steps=0, final_fraction=0.1)
    assert scheduled_lr(flat, 1) == 1e-3
