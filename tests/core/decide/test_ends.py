"""When everything is trained: a fact about steps and checkpoints, whatever the exit codes say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, AllocationStatus, Driver, Outcome, Severity, Tier, Verdict
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import POLICY, Story, kinds, only

TOLD = replace(POLICY, least_alert=Severity.INFO)
STEPS = 1000


def at_the_end(*checkpoints: int, policy: object = TOLD, last_step: int = STEPS) -> Story:
    story = Story(policy)  # type: ignore[arg-type]
    return story.training(last_step, checkpoints)


def alerts(story: Story, severity: Severity) -> list[str]:
    return [alert.told.body for alert in story.state.alerts.values() if alert.told.severity is severity]


def incident(story: Story):
    (found,) = story.state.incidents.values()
    return found


@pytest.mark.parametrize("code", [None, 1, 78, 65])
def test_a_crash_after_the_last_step_completes_with_one_warning_and_a_remark(code: int | None):
    story = at_the_end(900, STEPS)
    decided = story.rank_dies(STEPS, code=code)
    assert only(decided, e.RecoveryDecided).action is Action.COMPLETE
    assert only(decided, e.StopIntended).incident is None
    story.ends(Outcome.STOPPED)
    assert story.state.status is Status.COMPLETED
    assert "rank 1 on n2" in story.state.why
    assert f"all {STEPS} steps are trained" in story.state.why
    assert incident(story).proven
    assert len(alerts(story, Severity.WARNING)) == 1
    assert not alerts(story, Severity.PAGE)
    assert len(story.state.attempts) == 1


def test_the_decision_waits_for_the_checkpoint_that_is_being_written_and_examined():
    story = at_the_end(900)
    assert "recovery_decided" not in kinds(story.rank_dies(STEPS))
    assert story.see(seconds=60) == []
    story.checkpoint(STEPS, verify=False)
    story.ends(Outcome.FAILED)
    assert story.see(seconds=600) == [], "nothing is started while the last checkpoint is read"
    assert not story.state.finished
    known = story.state.checkpoints[f"/runs/12/12.00/checkpoints/step-{STEPS:08d}"]
    assert "lineage_completed" in kinds(
        story.see(e.CheckpointVerified(checkpoint=known.checkpoint, healthy=True, why=""))
    )


def test_a_last_checkpoint_that_is_never_written_is_trained_again():
    story = at_the_end(900)
    story.rank_dies(STEPS)
    story.see(seconds=POLICY.capacity.leave_seconds + 1)
    assert incident(story).decision.action is Action.RESTART
    assert story.ends(Outcome.STOPPED) == [], "a file system may show it a moment later"
    assert only(story.see(seconds=POLICY.examine_seconds + 1), e.AttemptIntended).checkpoint.step == 900


def test_a_damaged_last_checkpoint_is_trained_again_although_every_rank_left_with_0():
    story = at_the_end(900)
    story.checkpoint(STEPS, verify=False)
    story.ends(Outcome.COMPLETED)
    assert story.state.status is Status.TRAINING
    known = story.state.checkpoints[f"/runs/12/12.00/checkpoints/step-{STEPS:08d}"]
    decided = story.see(e.CheckpointRefused(checkpoint=known.checkpoint, why="__0_0.distcp differs"))
    assert "__0_0.distcp differs" in only(decided, e.IncidentOpened).cause
    assert only(decided, e.AttemptIntended).checkpoint.step == 900


def test_a_hung_examination_does_not_hold_the_end_for_ever():
    story = at_the_end(900)
    story.checkpoint(STEPS, verify=False)
    story.ends(Outcome.COMPLETED)
    assert story.see(seconds=POLICY.final_examine_seconds - 60) == []
    assert "lineage_completed" in kinds(story.see(seconds=120))
    assert "examination did not end" in story.state.why
    assert "step 900" in story.state.why, "the last good one is named"
    assert len(alerts(story, Severity.WARNING)) == 1


def test_an_unhealthy_last_checkpoint_completes_with_an_incident_that_names_the_last_good_one():
    story = at_the_end(900)
    story.checkpoint(STEPS, healthy=False)
    decided = story.ends(Outcome.COMPLETED)
    assert "lineage_completed" in kinds(decided)
    assert "the last good checkpoint is that of step 900" in only(decided, e.IncidentOpened).cause
    assert "step 900" in alerts(story, Severity.WARNING)[0]


def test_steps_that_nobody_has_seen_are_a_doubt():
    story = at_the_end(900, last_step=950)
    story.checkpoint(STEPS)
    story.ends(Outcome.COMPLETED)
    assert story.state.status is Status.COMPLETED
    assert "no telemetry of steps 951 to 1000" in story.state.why


def test_a_lost_last_line_of_telemetry_is_none():
    story = at_the_end(900, last_step=STEPS - 1)
    story.checkpoint(STEPS)
    story.ends(Outcome.COMPLETED)
    assert (story.state.status, story.state.why, story.state.incidents) == (Status.COMPLETED, "", {})


def test_a_divergence_that_is_seen_together_with_the_end_is_rolled_back():
    story = at_the_end(700, 800)
    story.checkpoint(900, healthy=False)
    story.checkpoint(STEPS, healthy=False)
    attempt = story.state.attempt
    story.write(
        e.SignalRaised(
            signal="loss_spike",
            tier=Tier.ACT,
            attempt=attempt.name,
            step=STEPS,
            onset_step=890,
            at=story.now,
            rule="test",
            evidence={"loss": 9.0, "median": 3.0},
        )
    )
    decided = story.ends(Outcome.COMPLETED)
    assert only(decided, e.RecoveryDecided).checkpoint.step == 700
    assert only(decided, e.AttemptIntended).run == "12.01"
    assert "lineage_completed" not in kinds(decided)


def test_a_node_that_goes_after_the_last_step_costs_nothing():
    story = at_the_end(900, STEPS)
    story.see(
        e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason="NODE_FAIL"),
    )
    decided = story.ends(Outcome.LOST)
    assert "lineage_completed" in kinds(decided)
    assert "lost after the last one" in story.state.why


def test_a_bad_gpu_is_excluded_also_at_the_end():
    story = at_the_end(900, STEPS)
    decided = story.judge("n2", Verdict.BAD, "xid_79")
    assert only(decided, e.NodeExcluded).node == "n2"
    story.ends(Outcome.STOPPED)
    assert story.state.status is Status.COMPLETED


def test_resume_at_the_last_step_is_complete_at_that_step():
    """The next attempt trains nothing and writes no telemetry."""
    story = at_the_end(900)
    story.rank_dies(STEPS)
    story.see(seconds=POLICY.capacity.leave_seconds + 1)
    story.checkpoint(STEPS)
    launched = only(story.ends(Outcome.STOPPED), e.LineageCompleted)
    assert launched.step == STEPS


def test_an_operator_who_drives_is_told_and_decides():
    story = at_the_end(700, 800)
    drive = Request(request="r7", author="ann", verb="drive", arguments={"driver": Driver.OPERATOR, "reason": "me"})
    story.see(event_of(story.state, drive))
    story.checkpoint(STEPS, healthy=False)
    story.spike(STEPS, onset=890)
    story.ends(Outcome.COMPLETED)
    assert not story.state.ended, "the loss is bad: an operator may still roll back"
    back = Request(request="r8", author="ann", verb="change", arguments={"to_step": 800, "reason": "diverged"})
    assert only(story.see(event_of(story.state, back)), e.AttemptIntended).checkpoint.step == 800


def test_a_hang_whose_ranks_left_before_they_answered_is_decided():
    story = at_the_end(400, last_step=450)
    story.signal("hang", 450, None, seconds=99.0, patience=30.0, phase="training")
    assert incident(story).stacks_at is not None
    story.ends(Outcome.FAILED)
    assert incident(story).decision is not None
