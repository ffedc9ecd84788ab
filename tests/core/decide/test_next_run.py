"""What a rollback keeps of earlier changes; and the rate that a dry run prints is the rate that the trainer gets."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.cli.shared import preview as dry_run
from opt_ops.config import Config
from opt_ops.core import events as e
from opt_ops.core.schedule import expected_lr, scheduled_lr
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import POLICY, SCHEDULE, Story


def asked(story: Story, **arguments: object) -> e.Event:
    request = Request(
        request=f"r{len(story.entries)}", author="ann", verb="change", arguments={"reason": "because", **arguments}
    )
    return event_of(story.state, request)


def printed(story: Story, event: e.Event, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(dry_run, "site_policy", lambda _: POLICY)
    coming = dry_run.preview(story.state, event, story.now, Config())
    return [f"would {verb} {rest}" for each in coming for verb, rest in each.lines]


def changed(story: Story, **arguments: object) -> None:
    """A change that takes effect: the run that it plans has begun, and trains."""
    event = asked(story, **arguments)
    assert not isinstance(event, e.RequestRefused), event.why
    story.see(event)
    attempt = story.state.attempt
    if attempt.leave_at is not None and attempt.stop_at is None:
        story.checkpoint(attempt.last_step)
    story.ends()
    assert story.state.attempt.live


def lasts(story: Story, steps: int) -> None:
    attempt = story.state.attempt
    start = attempt.checkpoint.step if attempt.checkpoint else 0
    story.train(start + steps)
    story.checkpoint(start + steps)


def test_a_rate_that_was_set_later_is_gone_after_a_rollback(monkeypatch: pytest.MonkeyPatch):
    story = Story().training(195, checkpoints=(100, 190))
    changed(story, lr=expected_lr(SCHEDULE, (), 196) * 0.5, settings=["optim.clip_norm=0.5", "steps=900"])
    lasts(story, 20)
    back = asked(story, to_step=100, lr_factor=0.75)
    said = printed(story, back, monkeypatch)
    assert "would train with the learning rate 0.75 × the schedule from step 101 on" in " ".join(said)
    (dropped,) = [line for line in said if line.startswith("would drop")]
    assert "× 0.5 after 195" in dropped
    assert "optim.clip_norm=0.5" in dropped
    assert "--keep-later" in dropped
    story.see(back)
    run = story.state.run
    assert [(f.step, f.factor) for f in run.lr_factors] == [(100, 0.75)]
    assert run.settings == ("steps=900",), "the end of the run is no setting of the optimizer"


def test_later_changes_are_kept_by_an_explicit_word(monkeypatch: pytest.MonkeyPatch):
    story = Story().training(195, checkpoints=(100, 190))
    changed(story, lr_factor=0.5, settings=["optim.clip_norm=0.5"])
    lasts(story, 20)
    back = asked(story, to_step=100, keep_later=True)
    (rate,) = [line for line in printed(story, back, monkeypatch) if line.startswith("would train")]
    assert "1 × the schedule from step 101 on" in rate
    assert "then 0.5 × the schedule from step 196 on" in rate
    story.see(back)
    assert [(f.step, f.factor) for f in story.state.run.lr_factors] == [(195, 0.5)]
    assert story.state.run.settings == ("optim.clip_norm=0.5",)


def test_skips_of_later_steps_are_dropped_and_those_of_earlier_ones_stay():
    story = Story().training(195, checkpoints=(50, 100, 190))
    changed(story, to_step=50, skip_batches=10)
    lasts(story, 100)  # up to 150
    changed(story, to_step=150, skip_batches=20)
    lasts(story, 30)
    first, second = story.state.run.skips
    changed(story, to_step=150)
    assert story.state.run.skips == (first, second), "it begins with the update after step 150"
    changed(story, to_step=100)
    assert story.state.run.skips == (first,) or story.state.run.checkpoint.step < 100


def test_a_playbook_multiplies_the_present_rate_once():
    """The second rollback goes further back than the first one did."""
    story = Story().training(450)
    story.spike(450, onset=440)
    story.ends()
    story.train(450)
    story.spike(450, onset=440)
    factors = story.state.run.lr_factors
    (factor,) = factors
    assert factor.factor == pytest.approx(0.75 * 0.67)


CHANGES = st.one_of(
    st.fixed_dictionaries({"lr_factor": st.sampled_from([0.5, 0.8, 1.25])}),
    st.fixed_dictionaries({"lr": st.sampled_from([6e-5, 3e-4])}),
    st.fixed_dictionaries(
        {"to_step": st.integers(1, 400)},
        optional={"lr_factor": st.sampled_from([0.5, 0.75]), "keep_later": st.booleans()},
    ),
)


@given(st.lists(st.tuples(CHANGES, st.integers(6, 60)), min_size=1, max_size=5))
def test_the_rate_that_a_dry_run_prints_is_the_rate_that_the_trainer_is_told(changes: list[tuple[dict, int]]):
    story = Story()
    story.begin()
    story.hold()
    lasts(story, 60)
    with pytest.MonkeyPatch.context() as patch:
        for change, steps in changes:
            event = asked(story, **change)
            if isinstance(event, e.RequestRefused):
                continue
            said = " ".join(printed(story, event, patch))
            changed(story, **change)
            check(story, said)
            lasts(story, steps)


def check(story: Story, said: str) -> None:
    """Compare what was printed with the factors of the launch, for every later step."""
    run = story.state.run
    start = run.checkpoint.step if run.checkpoint else 0
    told = {step: expected_lr(SCHEDULE, run.lr_factors, step) for step in range(start + 1, 1001)}
    if set_to := re.search(r"learning rate (\S+) at the update after it", said):
        assert told[start + 1] == pytest.approx(float(set_to[1]))
        return
    parts = [(start, m[1]) for m in re.finditer(r"(\S+) × the schedule from there on", said)]
    parts += [(int(m[2]) - 1, m[1]) for m in re.finditer(r"(\S+) × the schedule from step (\d+) on", said)]
    assert parts
    for step, rate in told.items():
        scale = [float(scale) for since, scale in parts if since < step][-1]
        assert rate == pytest.approx(scale * scheduled_lr(SCHEDULE, step), rel=1e-4), step
