"""Evaluations of checkpoints: which ones, where, and what they give way to."""

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.evaluation import (
    COMPLETED_SECONDS,
    FAILURES,
    LOSSES,
    MILESTONES,
    NO_NODES_SECONDS,
    RETRY_SECONDS,
    due,
    to_come,
)
from opt_ops.core.decide.policy import EvaluationRule, Policy
from opt_ops.core.state.status import Status
from opt_ops.core.values import AllocationStatus, Driver, EvaluationEnd, Outcome, Severity, Shape, Verdict
from opt_ops.supervise.evaluation_orders import EvaluationCommand
from opt_ops.supervise.executor import Site, orders_of
from tests.core.story import POLICY, Story, kinds, only

EVERY_200 = EvaluationRule(every=200, tasks=("arc_easy", "piqa"))
SITE = Site(
    folder="/runs/12",
    trainer=("train",),
    evaluate=EvaluationCommand(argv=("opt-ops", "ckpt", "evaluate"), samples=("--prompts", "p", "--tokens", "60")),
)


def policy(rule: EvaluationRule = EVERY_200, **changes: object) -> Policy:
    return replace(POLICY, evaluation=replace(rule, **changes), least_alert=Severity.WARNING)


def story(spares: int = 1, checkpoints: tuple[int, ...] = (100, 200), **changes: object) -> Story:
    told = Story(policy(**changes), Shape(nodes=2, spares=spares, ranks_per_node=1))
    told.begin()
    told.hold(*(f"n{number + 1}" for number in range(2 + spares)))
    told.train(450)
    for each in checkpoints:
        told.checkpoint(each)
    return told


def ended(told: Story, end: EvaluationEnd = EvaluationEnd.DONE, seconds: float = 1.0) -> list[e.Event]:
    running = told.state.evaluation
    assert running is not None
    return told.see(e.EvaluationEnded(evaluation=running.name, end=end, why="test"), seconds=seconds)


def steps(told: Story) -> list[int]:
    return [each.intended.checkpoint.step for each in told.state.evaluations.values()]


def test_a_verified_checkpoint_at_a_multiple_is_evaluated_on_the_spare_that_a_launch_takes_last():
    told = story(spares=2, checkpoints=(100,))
    assert told.state.evaluation is None, "no multiple of 200"
    intended = only(told.checkpoint(200), e.EvaluationIntended)
    assert (intended.evaluation, intended.node, intended.tasks) == ("12-ev001", "n4", ("arc_easy", "piqa"))
    order = orders_of(told.state, SITE).evaluate
    assert (order.node, order.holder) == ("n4", "12-n0")
    argv = ("opt-ops", "ckpt", "evaluate", "12.00/200", "--tasks", "arc_easy,piqa", "-o", "json")
    assert order.argv == argv
    assert ended(told) == []
    assert orders_of(told.state, SITE).evaluate is None
    assert steps(told) == [200], "once"


def test_nothing_is_evaluated_unless_it_is_asked_for():
    assert steps(story(every=0)) == []
    assert steps(story(spares=0)) == [], "no idle node"


@pytest.mark.parametrize("healthy", [True, False])
def test_the_first_sound_checkpoint_after_a_multiple_counts_and_waits_for_an_earlier_ones_examination(healthy: bool):
    told = story(checkpoints=())
    told.checkpoint(200, verify=False)
    told.checkpoint(250)
    assert steps(told) == []
    told.see(e.CheckpointVerified(checkpoint=known(told, 200), healthy=healthy, why="" if healthy else "x"))
    assert steps(told) == [200 if healthy else 250]
    ended(told)
    told.checkpoint(350)
    assert len(steps(told)) == 1, "of each multiple one"


def known(told: Story, step: int):
    return next(each.checkpoint for each in told.state.checkpoints.values() if each.checkpoint.step == step)


def test_a_milestone_that_was_evaluated_and_pruned_is_not_followed_by_its_neighbour():
    told = story(checkpoints=(200,))
    ended(told)
    told.checkpoint(250)
    told.see(e.CheckpointsGone(run="12.00", paths=(known(told, 200).path,)))
    assert steps(told) == [200]


def test_the_newest_waits_least_and_of_the_newest_none_is_skipped():
    told = story(checkpoints=(200,), every=10)
    for step in range(210, 420, 10):
        told.checkpoint(step)
    while told.state.evaluation is not None:
        ended(told)
    assert steps(told) == [200, *range(410, 410 - 10 * MILESTONES, -10)]


def test_what_is_gone_or_was_taken_back_before_its_turn_is_dropped():
    told = story(checkpoints=(200, 250, 300, 400), every=100)
    assert [each.checkpoint.step for each in due(told.state, told.policy.evaluation)] == [400, 300, 200]
    told.see(e.CheckpointsGone(run="12.00", paths=(known(told, 300).path,)))
    told.spike(450, 390)  # a rollback to step 250
    told.ends()
    assert told.state.run.name == "12.01"
    assert [each.checkpoint.step for each in due(told.state, told.policy.evaluation)] == [200]


def test_prompts_have_an_interval_of_their_own_and_share_a_process():
    told = story(checkpoints=(), samples_every=300)
    told.checkpoint(200)
    ended(told)
    told.checkpoint(300)
    told.checkpoint(310)
    assert orders_of(told.state, SITE).evaluate.argv[3:] == (
        "12.00/300",
        "--prompts",
        "p",
        "--tokens",
        "60",
        "-o",
        "json",
    )
    ended(told)
    told.checkpoint(400)
    ended(told)
    told.checkpoint(600)
    assert orders_of(told.state, SITE).evaluate.argv[4:] == (
        *("--tasks", "arc_easy,piqa"),
        *("--prompts", "p", "--tokens", "60"),
        *("-o", "json"),
    )
    made = [(each.intended.checkpoint.step, each.intended.samples) for each in told.state.evaluations.values()]
    assert made == [(200, False), (300, True), (400, False), (600, True)]


def test_a_launch_that_needs_the_spare_takes_it_in_the_same_breath_and_the_checkpoint_waits():
    told = story()
    told.judge("n2", Verdict.BAD, "xid_79")
    decided = told.ends()
    assert only(decided, e.AttemptIntended).nodes == ("n1", "n3")
    end = only(decided, e.EvaluationEnded)
    assert (end.end, end.why) == (EvaluationEnd.GIVEN_UP, "12.00-a1 needs n3")
    orders = orders_of(told.state, SITE)
    assert (orders.launch.nodes, orders.evaluate) == (("n1", "n3"), None)
    told.train(460)
    assert told.state.evaluation is None, "no spare is left"


def test_a_restart_that_does_not_need_the_spare_leaves_the_evaluation_alone():
    told = story()
    told.rank_dies(450)
    told.ends()
    assert told.state.attempt.name == "12.00-a1"
    assert told.state.evaluation is not None


@pytest.mark.parametrize(
    ("what", "end"),
    [
        (lambda told: told.judge("n3", Verdict.BAD, "xid_79"), EvaluationEnd.GIVEN_UP),
        (lambda told: told.see(e.NodeExcluded(node="n3", incident="operator", reason="x")), EvaluationEnd.GIVEN_UP),
        (lambda told: told.judge("n3", Verdict.UNKNOWN, "silent"), EvaluationEnd.LOST),
        (lambda told: told.changed("12-n0", "n1", "n2"), EvaluationEnd.LOST),
        (lambda told: told.changed("12-n0", "n1", "n2", "n3", ends_at=told.now + 3), EvaluationEnd.GIVEN_UP),
    ],
    ids=["bad", "excluded", "silent", "gone", "time limit"],
)
def test_it_gives_way_to_everything_else(what, end: EvaluationEnd):
    told = story()
    assert told.state.evaluation is not None
    assert only(what(told), e.EvaluationEnded).end is end
    assert told.state.evaluation is None


def test_a_node_that_cannot_be_heard_for_a_while_keeps_it():
    told = story()
    told.judge("n3", Verdict.UNKNOWN, "unheard")
    assert told.state.evaluation is not None


def test_after_two_failures_a_person_is_told_once_and_the_checkpoint_is_left():
    told = story()
    assert ended(told, EvaluationEnd.FAILED) == [], "not again at once"
    assert only(told.see(seconds=RETRY_SECONDS), e.EvaluationIntended).checkpoint.step == 200
    decided = ended(told, EvaluationEnd.FAILED)
    alert = only(decided, e.AlertIntended)
    assert (alert.severity, alert.alert) == (Severity.WARNING, "12/evaluation/12.00/200")
    assert "opt-ops ckpt evaluate 12.00/200 --tasks arc_easy,piqa" in alert.body
    assert told.see(seconds=10 * RETRY_SECONDS) == []
    assert len(steps(told)) == FAILURES
    told.checkpoint(400)
    assert steps(told)[-1] == 400


def test_a_checkpoint_whose_evaluations_take_their_nodes_down_is_left_too():
    told = story()
    for _ in range(LOSSES - 1):
        assert "evaluation_intended" in kinds(ended(told, EvaluationEnd.LOST))
    assert kinds(ended(told, EvaluationEnd.LOST)) == ["alert_intended"]
    assert told.see(seconds=10 * RETRY_SECONDS) == []


def test_given_up_ones_begin_again_however_often():
    told = story()
    for _ in range(10):
        assert "evaluation_intended" in kinds(ended(told, EvaluationEnd.GIVEN_UP))


def test_on_a_node_it_outlives_the_daemon_and_beside_the_daemon_it_does_not():
    told = story()
    assert "evaluation_ended" not in kinds(told.daemon())
    assert told.state.evaluation is not None
    told = story(on_spares=False)
    assert told.state.evaluation.intended.node is None
    for _ in range(2 * LOSSES):
        decided = told.daemon()
        assert only(decided, e.EvaluationEnded).end is EvaluationEnd.LOST
        assert only(decided, e.EvaluationIntended).checkpoint.step == 200


@pytest.mark.parametrize("on_spares", [True, False])
def test_the_last_checkpoint_is_evaluated_beside_the_daemon_and_no_node_is_kept_for_it(on_spares: bool):
    told = story(spares=1, checkpoints=(), on_spares=on_spares)
    told.policy = replace(told.policy, least_alert=Severity.INFO)
    told.train(1000)
    decided = told.ends(Outcome.COMPLETED, 1000) + told.checkpoint(1000)
    assert told.state.status is Status.COMPLETED
    assert "release_intended" in kinds(decided)
    (alert,) = [each for each in decided if isinstance(each, e.AlertIntended)]
    assert "not evaluated" not in alert.body
    told.see(e.AlertSettled(alert=alert.alert, delivered=True, why=""))
    told.changed("12-n0", status=AllocationStatus.ENDED)
    intended = told.state.evaluation.intended
    assert (intended.checkpoint.step, intended.node) == (1000, None)
    assert not told.state.finished
    assert not told.state.settled
    ended(told)
    assert told.state.finished


def test_the_last_evaluation_is_tried_again_before_the_lineage_is_left_alone():
    told = story(checkpoints=(), on_spares=False)
    told.train(1000)
    told.ends(Outcome.COMPLETED, 1000)
    told.checkpoint(1000)
    ended(told, EvaluationEnd.FAILED)
    assert to_come(told.state, told.now, told.policy)
    told.see(seconds=RETRY_SECONDS)
    assert steps(told) == [1000, 1000]
    (warning,) = [each for each in ended(told, EvaluationEnd.FAILED) if isinstance(each, e.AlertIntended)]
    assert "is not evaluated" in warning.title
    assert not to_come(told.state, told.now, told.policy)


def test_what_a_spare_was_at_when_training_ended_goes_on_beside_the_daemon():
    told = story()
    told.train(1000)
    told.ends(Outcome.COMPLETED, 1000)
    told.checkpoint(1000)
    told.changed("12-n0", status=AllocationStatus.ENDED)
    first, second = told.state.evaluations.values()
    assert (first.intended.node, first.end) == ("n3", EvaluationEnd.GIVEN_UP)
    assert (second.intended.node, second.intended.checkpoint.step) == (None, 1000)
    ended(told)
    assert steps(told) == [200, 1000, 200], "the milestone that was interrupted, too"
    ended(told)
    assert told.state.finished


def test_a_lineage_without_nodes_is_evaluated_beside_the_daemon_until_a_spare_is_there():
    told = story()
    told.changed("12-n0", status=AllocationStatus.ENDED)
    told.ends()
    assert told.state.evaluation is None
    told.see(seconds=NO_NODES_SECONDS - 60.0)
    assert told.state.evaluation is None, "the next job may begin at once"
    intended = only(told.see(seconds=120.0), e.EvaluationIntended)
    assert (intended.checkpoint.step, intended.node) == (200, None)
    told.hold("n1", "n2", "n3")
    assert told.state.evaluation is not None, "no node is idle before training goes on"
    decided = told.train(460)
    assert only(decided, e.EvaluationEnded).why == "n3 is idle and does it"
    assert only(decided, e.EvaluationIntended).node == "n3"


def test_a_cancelled_lineage_is_told_with_the_command_that_evaluates_it():
    told = story(spares=0)
    told.policy = replace(told.policy, least_alert=Severity.INFO)
    decided = told.see(e.StopRequested(request="r1", author="ann", reason="x"))
    (alert,) = [each for each in decided if isinstance(each, e.AlertIntended)]
    assert "not evaluated: opt-ops ckpt evaluate 12.00/200 --tasks arc_easy,piqa" in alert.body


def test_a_lineage_that_ended_long_ago_is_left_alone():
    told = story(checkpoints=(), every=0, on_spares=False)
    told.train(1000)
    told.ends(Outcome.COMPLETED, 1000)
    told.checkpoint(1000)
    assert told.state.status is Status.COMPLETED
    told.policy = policy(on_spares=False)
    told.now += COMPLETED_SECONDS
    told.see(e.NoteAdded(request="r9", author="ann", target="12", text="hm"))
    assert told.state.evaluation is None


def test_a_training_that_is_only_watched_is_not_evaluated():
    told = story(every=0)
    told.see(e.DriverChanged(request="r1", author="ann", driver=Driver.SHADOW, reason=""))
    told.policy = policy()
    told.see(seconds=10.0)
    assert told.state.evaluation is None


def test_a_cancelled_lineage_ends_what_runs_beside_the_daemon():
    told = story(on_spares=False)
    decided = told.see(e.StopRequested(request="r1", author="ann", reason="x"))
    assert only(decided, e.EvaluationEnded).end is EvaluationEnd.GIVEN_UP
    told.see(seconds=10.0)
    assert told.state.evaluation is None
