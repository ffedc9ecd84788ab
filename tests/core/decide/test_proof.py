"""The proof of a recovery under other schedules than linear: what is proven, and what is said not to be."""

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.proof import with_settings
from opt_ops.core.schedule import scheduled_lr
from opt_ops.core.state.status import Status
from opt_ops.core.values import Schedule
from tests.core.story import OPTIMIZER, SCHEDULE, Story, only

KINDS = {
    "cosine": replace(SCHEDULE, kind="cosine", delay=1),
    "polynomial": replace(SCHEDULE, kind="polynomial", power=2.0),
    "constant": Schedule(kind="constant", peak_lr=1e-3, warmup_steps=10),
    "wsd": replace(SCHEDULE, kind="wsd", decay_steps=900, decay="sqrt"),
    "table": Schedule(kind="table", knots=((0.0, 1e-3), (1000.0, 1e-4))),
}
GREEDY = Schedule(kind="greedy")


def rolled_back(story: Story, checkpoints: tuple[int, ...] = (100, 200, 300)) -> Story:
    """A loss spike has ended the run; the next one begins at the newest of the checkpoints, at 0.75 of the rate."""
    story.training(460, checkpoints=checkpoints)
    story.spike(460, onset=410)
    story.ends()
    return story


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_is_proven_under_every_kind(kind: str):
    closed = only(rolled_back(Story(schedule=KINDS[kind])).train(310), e.IncidentClosed)
    assert closed.proven, closed.proof
    assert closed.proof["schedule_proven"] is True
    lr = scheduled_lr(KINDS[kind], 301)
    assert lr is not None
    assert closed.proof["readbacks"][0]["lr"] == pytest.approx(0.75 * lr, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_that_is_a_hundred_millionth_off_is_not_the_schedule(kind: str):
    decided = rolled_back(Story(schedule=KINDS[kind])).train(310, lr_error=1 + 1e-8)
    assert not only(decided, e.IncidentClosed).proven
    assert only(decided, e.IncidentClosed).proof["schedule_proven"] is False
    assert "learning rate" in only(decided, e.LineageHalted).why


def test_of_an_unknown_kind_the_ratio_to_the_rate_of_its_schedule_is_proven():
    story = Story(schedule=GREEDY)
    story.base_lr = lambda step: 1e-3 / step
    closed = only(rolled_back(story).train(310), e.IncidentClosed)
    assert closed.proven
    assert (closed.proof["schedule_proven"], closed.proof["factors_proven"]) == (False, True)
    first = closed.proof["readbacks"][0]
    assert (first["expected_lr"], first["base_lr"], first["expected_factor"]) == (None, 1e-3 / 301, 0.75)


def test_of_an_unknown_kind_a_factor_that_is_not_in_force_halts():
    story = Story(schedule=GREEDY)
    story.base_lr = lambda step: 1e-3 / step
    decided = rolled_back(story).train(310, lr_error=1 / 0.75)
    assert "learning rate" in only(decided, e.LineageHalted).why
    assert story.state.status is Status.HALTED


def test_without_a_base_rate_the_proof_is_of_step_optimizer_and_loss_only():
    closed = only(rolled_back(Story(schedule=GREEDY)).train(310), e.IncidentClosed)
    assert closed.proven
    assert (closed.proof["schedule_proven"], closed.proof["factors_proven"]) == (False, False)
    assert "base_lr" not in closed.proof["readbacks"][0]
    decided = rolled_back(Story(schedule=GREEDY)).train(310, betas=(0.9, 0.999))
    assert "betas" in only(decided, e.LineageHalted).why


@pytest.mark.parametrize("schedule", [KINDS["cosine"], GREEDY])
def test_an_update_whose_rate_is_zero_proves_nothing_and_a_later_one_is_taken(schedule: Schedule):
    story = Story(schedule=schedule)
    story.base_lr = lambda step: scheduled_lr(KINDS["cosine"], step) or 0.0
    rolled_back(story, checkpoints=())
    assert story.train(5) == [], "update 1 of a warm-up that lags one update has the rate 0"
    closed = only(story.train(6, readbacks=6), e.IncidentClosed)
    assert closed.proven
    assert [each["step"] for each in closed.proof["readbacks"]] == [1, 2, 3, 4, 5, 6]


def test_a_rate_that_stays_zero_is_not_waited_for_without_end():
    story = Story(schedule=GREEDY)
    story.base_lr = lambda _: 0.0
    rolled_back(story)
    assert story.train(312, readbacks=12) == []
    closed = only(story.train(313, readbacks=13), e.IncidentClosed)
    assert closed.proven
    assert closed.proof["factors_proven"] is False, "zero times any factor is zero"


def test_a_rate_above_zero_where_the_schedule_gives_none_is_off():
    story = Story(schedule=replace(SCHEDULE, kind="constant", peak_lr=0.0))
    rolled_back(story)
    story.schedule = replace(story.schedule, peak_lr=1e-9)
    decided = story.train(310)
    assert "not 0.0" in only(decided, e.LineageHalted).why


def test_settings_of_a_run_change_the_fields_that_a_kind_has():
    asked = ("optim.peak_lr=2e-3", "optim.final_fraction=0.2", "optim.warmup_steps=20", "optim.total_steps=2000")
    changed, _ = with_settings(KINDS["wsd"], OPTIMIZER, asked)
    fields = {"peak_lr": 2e-3, "final_fraction": 0.2, "warmup_steps": 20, "total_steps": 2000}
    assert changed == replace(KINDS["wsd"], **fields)
    assert with_settings(KINDS["table"], OPTIMIZER, asked)[0] == KINDS["table"]
