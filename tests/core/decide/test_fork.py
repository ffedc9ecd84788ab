"""A fork: its first run goes on from the verified checkpoint of another lineage, and never from scratch."""

from __future__ import annotations

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.queries import has_own_good, newest_good
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, LrFactor, Parent, Skip
from tests.core.story import POLICY, Story, kinds, only

PARENT = Parent(lineage="11", run="11.02", step=100, checkpoint="/runs/11/11.02/checkpoints/step-00000100")


def fork() -> Story:
    story = Story()
    story.daemon()
    story.see(
        e.LineageStarted(
            request="r0",
            author="ann",
            lineage="12",
            recipe="opt-tiny",
            settings=(),
            shape=story.shape,
            parent=PARENT,
            lr_factors=(LrFactor(step=50, factor=0.5), LrFactor(step=100, factor=0.5)),
            skips=(Skip(first=60, last=70),),
        )
    )
    return story


def verified(story: Story, why: str = "") -> list[e.Event]:
    story.see(e.CheckpointSeen(checkpoint=PARENT.saved))
    if why:
        return story.see(e.CheckpointRefused(checkpoint=PARENT.saved, why=why))
    return story.see(e.CheckpointVerified(checkpoint=PARENT.saved, healthy=True, why=""))


def test_the_first_run_has_the_parents_step_factors_and_skips():
    run = fork().state.run
    assert run is not None
    assert (run.name, run.parent, run.checkpoint) == ("12.00", "11.02", PARENT.saved)
    assert [(each.step, each.factor) for each in run.lr_factors] == [(50, 0.5), (100, 0.5)]
    assert run.skips == (Skip(first=60, last=70),)
    assert run.cause == "fork of 11.02 at step 100"


def test_nothing_starts_before_the_parents_checkpoint_is_verified_however_long_that_takes():
    story = fork()
    assert "attempt_intended" not in kinds(story.hold())
    assert story.see(e.CheckpointSeen(checkpoint=PARENT.saved)) == []
    assert story.see(seconds=50 * POLICY.examine_seconds) == []
    started = story.see(e.CheckpointVerified(checkpoint=PARENT.saved, healthy=True, why=""))
    assert only(started, e.AttemptIntended).checkpoint == PARENT.saved


def test_a_damaged_checkpoint_halts_the_fork():
    story = fork()
    story.hold()
    halted = only(verified(story, why="layer 3 does not match"), e.LineageHalted)
    assert halted.why.startswith("this lineage began from step 100 of 11.02, and that checkpoint is damaged: layer 3")


def test_a_checkpoint_that_nobody_has_seen_is_waited_for_and_then_the_fork_halts():
    story = fork()
    story.hold()
    assert story.see(seconds=POLICY.examine_seconds / 2) == []
    assert "that checkpoint is gone" in only(story.see(seconds=POLICY.examine_seconds), e.LineageHalted).why
    verified(story)
    resumed = story.see(e.ResumeRequested(request="r1", author="ann", reason="restored"))
    assert kinds(resumed) == ["allocation_intended"]
    found = newest_good(story.state, "12.00")
    assert found is not None
    assert found.checkpoint == PARENT.saved


@pytest.mark.parametrize("own", [(), (150,)])
def test_a_rank_that_dies_restarts_from_the_newest_good_checkpoint(own: tuple[int, ...]):
    story = fork()
    story.hold()
    verified(story)
    story.train(180)
    for step in own:
        story.checkpoint(step)
    assert has_own_good(story.state) is bool(own)
    story.rank_dies(180)
    story.ends()
    assert story.state.attempt is not None
    assert story.state.attempt.checkpoint is not None
    assert story.state.attempt.checkpoint.step == (own[-1] if own else 100)


def test_a_spike_behind_its_first_steps_goes_back_to_the_parents_checkpoint():
    story = fork()
    story.hold()
    verified(story)
    story.train(300)
    story.checkpoint(280)
    decided = only(story.spike(300, onset=260), e.RecoveryDecided)
    assert (decided.action, decided.checkpoint) == (Action.ROLLBACK, PARENT.saved)
    story.ends()
    assert story.state.run is not None
    found = newest_good(story.state, story.state.run.name)
    assert found is not None
    assert found.checkpoint == PARENT.saved


def test_it_never_starts_from_scratch_even_where_little_would_be_lost():
    story = fork()
    story.hold()
    verified(story)
    story.train(300)
    story.checkpoint(280)
    story.see(e.CheckpointsGone(run=PARENT.run, paths=(PARENT.checkpoint,)))
    decided = only(story.spike(300, onset=260), e.RecoveryDecided)
    assert decided.action is Action.HALT
    assert "a fork of 11.02 does not start from scratch" in decided.why
    assert story.state.status is Status.HALTED
