"""The learning rate that the proof expects: against other people's schedules, and against any fields."""

import math
import random
from dataclasses import asdict
from typing import Any

import pytest

from opt_ops.contract.schedule import lr_of
from opt_ops.core.codec import plain, reader_of
from opt_ops.core.schedule import PlannedLr, expected_lr, scheduled_lr
from opt_ops.core.values import LrFactor, Schedule

SCHEDULE = Schedule(peak_lr=6e-4, warmup_steps=100, total_steps=1100, final_fraction=0.1)
PEAK, STEPS = 3e-4, 700


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


def theirs(name: str, warmup: int, **options: Any) -> list[float]:
    """The learning rates of 700 updates, as Hugging Face's Trainer uses them."""
    import torch  # here: they take seconds, and a collection of tests needs neither
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, options or None)
    found: list[float] = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def knots(name: str, warmup: int, **options: Any) -> Schedule:
    table = tuple((float(update), lr) for update, lr in enumerate(theirs(name, warmup, **options)))
    return Schedule(kind="table", delay=1, knots=table)


def ours(kind: str, warmup: int, **fields: Any) -> Schedule:
    own = {"peak_lr": PEAK, "warmup_steps": warmup, "total_steps": STEPS, "delay": 1, "kind": kind}
    return Schedule(**own | fields)


def cases(warmup: int) -> list[tuple[str, dict[str, Any], Schedule]]:
    """The schedulers of transformers, and what they are called in config.json."""
    least = {"min_lr_rate": 0.1}
    wsd = {"num_decay_steps": 200, "min_lr_ratio": 0.05}
    ends = {"final_fraction": 0.05, "warmup_from": 0.05, "decay_steps": 200}
    return [
        ("linear", {}, ours("linear", warmup)),
        ("cosine", {}, ours("cosine", warmup)),
        ("cosine", {"num_cycles": 1.5}, ours("cosine", warmup, cycles=1.5)),
        ("cosine_with_min_lr", least, ours("cosine", warmup, final_fraction=0.1)),
        ("cosine_warmup_with_min_lr", least, ours("cosine", warmup, final_fraction=0.1, delay=0)),
        ("cosine_with_restarts", {"num_cycles": 3}, knots("cosine_with_restarts", warmup, num_cycles=3)),
        ("polynomial", {}, ours("polynomial", warmup, final_fraction=1e-7 / PEAK)),
        ("polynomial", {"power": 2.5, "lr_end": 3e-5}, ours("polynomial", warmup, final_fraction=0.1, power=2.5)),
        ("constant", {}, ours("constant", 0, total_steps=0)),
        ("constant_with_warmup", {}, ours("constant", warmup, total_steps=0)),
        ("inverse_sqrt", {}, knots("inverse_sqrt", warmup)),
        ("warmup_stable_decay", wsd, ours("wsd", warmup, decay="cosine", **ends)),
        ("warmup_stable_decay", wsd | {"decay_type": "linear"}, ours("wsd", warmup, decay="linear", **ends)),
        ("warmup_stable_decay", wsd | {"decay_type": "1-sqrt"}, ours("wsd", warmup, decay="sqrt", **ends)),
    ]


@pytest.mark.parametrize("warmup", [0, 1, 60])
def test_the_curves_are_those_of_transformers(warmup: int):
    for name, options, schedule in cases(warmup):
        wanted = theirs(name, warmup, **options)
        found = [scheduled_lr(schedule, step) for step in range(1, STEPS + 1)]
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-14 * PEAK), (name, options)
        assert len(set(wanted)) > 1 or name == "constant" or warmup == 0, "the curve is one"


def test_every_scheduler_of_transformers_has_a_word_here_or_is_known_to_have_none():
    from transformers.optimization import SchedulerType

    unknown = {"reduce_lr_on_plateau", "greedy"}
    assert {name for name, _, _ in cases(60)} | unknown == {str(each.value) for each in SchedulerType}
    assert all(scheduled_lr(Schedule(kind=kind, peak_lr=PEAK), 5) is None for kind in unknown)


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        ("linear", {1: 0.2, 5: 1.0, 16: 1.0, 17: 0.8, 20: 0.2}),
        ("sqrt", {16: 1.0, 17: 1 - math.sqrt(0.2), 20: 1 - math.sqrt(0.8)}),
        ("cosine", {16: 1.0, 17: 0.5 * (1 + math.cos(0.2 * math.pi)), 20: 0.5 * (1 + math.cos(0.8 * math.pi))}),
    ],
)
def test_torchtitan_trains_twenty_updates_of_a_schedule_of_twenty_one(decay: str, shares: dict[int, float]):
    """By hand, of training.steps 20, warmup_steps 5, decay_ratio 0.2: a virtual last step keeps update 20 above 0."""
    schedule = Schedule(kind="wsd", peak_lr=1.0, warmup_steps=5, total_steps=21, decay_steps=5, decay=decay)
    assert {step: scheduled_lr(schedule, step) for step in shares} == pytest.approx(shares, rel=1e-12)


def test_a_table_is_flat_outside_its_knots_and_straight_between_them():
    schedule = Schedule(kind="table", knots=((10.0, 1e-3), (20.0, 3e-3), (40.0, 0.0)), delay=1)
    wanted = {1: 1e-3, 11: 1e-3, 16: 2e-3, 21: 3e-3, 31: 1.5e-3, 41: 0.0, 10**9: 0.0}
    assert {step: scheduled_lr(schedule, step) for step in wanted} == pytest.approx(wanted, rel=1e-12)
    one = Schedule(kind="table", knots=((7.0, 5e-4),))
    assert {scheduled_lr(one, step) for step in (1, 7, 8, 10**9)} == {5e-4}


def test_the_corners_of_every_kind():
    at_once = Schedule(kind="wsd", peak_lr=1.0, warmup_steps=2, total_steps=9, final_fraction=0.1)
    assert [scheduled_lr(at_once, step) for step in (1, 2, 9, 10)] == [0.5, 1.0, 1.0, 0.1], "a decay of no steps"
    early = Schedule(kind="wsd", peak_lr=1.0, warmup_steps=4, total_steps=10, decay_steps=10)
    assert [scheduled_lr(early, step) for step in (3, 4, 10, 99)] == pytest.approx([0.75, 0.6, 0.0, 0.0])
    for kind in ("linear", "cosine", "polynomial"):
        no_way = Schedule(kind=kind, peak_lr=1.0, warmup_steps=5, total_steps=5, final_fraction=0.1)
        assert [scheduled_lr(no_way, step) for step in (4, 5, 50)] == [0.8, 1.0, 1.0], kind


EXTREME = (0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-300, 1e30, -1e30, 1.7e308, -1.7e308)
LARGE = (0, 1, 2, 7, 10**9, -1, -(10**9), 2**63)


@pytest.mark.parametrize("warmup", [0, 60])
def test_the_contract_computes_the_same_by_code_of_its_own(warmup: int):
    for _, _, schedule in cases(warmup):
        stated = asdict(schedule)
        for step in range(1, STEPS + 50, 7):
            assert lr_of(stated, [(300, 0.5)], step) == pytest.approx(
                expected_lr(schedule, [LrFactor(step=300, factor=0.5)], step), rel=1e-9, abs=1e-14 * PEAK
            )
    assert lr_of({"kind": "greedy"}, [], 5) is None


def test_no_fields_whatever_raise():
    """Finite fields and any step give a finite number, or None where none follows."""
    draw = random.Random(14)
    for _ in range(20_000):
        kind = draw.choice(("linear", "cosine", "polynomial", "constant", "wsd", "table", "greedy", ""))
        whole = {name: draw.choice(LARGE) for name in ("warmup_steps", "total_steps", "delay", "decay_steps")}
        names = ("peak_lr", "final_fraction", "warmup_from", "cycles", "power")
        knots = tuple((draw.choice(EXTREME), draw.choice(EXTREME)) for _ in range(draw.randrange(4)))
        schedule = Schedule(
            kind=kind,
            decay=draw.choice(("linear", "cosine", "sqrt", "exp")),
            knots=knots,
            **whole,
            **{name: draw.choice(EXTREME) for name in names},
        )
        for step in (1, 2, 7, 8, 10**9, 2**62):
            lr = scheduled_lr(schedule, step)
            assert lr is None or math.isfinite(lr), (schedule, step)


def test_a_schedule_comes_back_from_the_journal_and_an_old_one_is_still_read():
    read = reader_of(Schedule)
    for _, _, schedule in cases(60):
        assert read(plain(schedule), "schedule") == schedule
    old = {"peak_lr": 6e-4, "warmup_steps": 100, "total_steps": 1100, "final_fraction": 0.1}
    assert read(old, "schedule") == SCHEDULE
    assert asdict(SCHEDULE)["knots"] == ()


def test_of_an_unknown_kind_the_trainer_says_what_its_schedule_gave():
    planned = PlannedLr(schedule=Schedule(kind="greedy"), factors=(LrFactor(step=10, factor=0.5),))
    assert planned.at(11) is None
    assert [planned.due(10, 4e-4), planned.due(11, 4e-4), planned.due(11, None)] == [4e-4, 2e-4, None]
    known = PlannedLr(schedule=SCHEDULE)
    assert known.due(600, 1.0) == known.at(600), "a trainer's own word counts for nothing where opt-ops computes"
