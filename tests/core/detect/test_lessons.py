"""What replays of OPT-175B's record have taught: a human was called, or hours were lost, for nothing."""

from dataclasses import replace

from opt_ops.core import events as e
from opt_ops.core.detect.point import Busy
from opt_ops.core.detect.straggler import StragglerDetector, StragglerRule
from opt_ops.core.memo import memoize_recent
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Outcome, Severity, Shape, Verdict
from tests.core.detect.test_throughput import at
from tests.core.story import POLICY, Story, only


def test_bad_spares_spend_no_budget():
    nodes = tuple(f"n{number}" for number in range(1, 60))
    story = Story(shape=Shape(nodes=2, spares=57, ranks_per_node=1))
    story.begin()
    story.hold(*nodes)
    story.train(450)
    story.checkpoint(400)
    for node in nodes[2:50]:
        story.see(seconds=1200)  # the limit on excluded nodes is another story
        decided = story.judge(node, Verdict.BAD, "gpu_lost")
        assert only(decided, e.RecoveryDecided).action is Action.EXCLUDE
        story.see(e.NodeDrained(node=node, done=True, why=""))
    decided = story.judge("n1", Verdict.BAD, "gpu_lost")
    assert only(decided, e.RecoveryDecided).action is Action.RESTART
    assert story.state.status is not Status.HALTED


def test_launches_that_fail_far_apart_are_not_one_place():
    story = Story().training(450)
    for failed in range(1, 9):
        story.signal("process_death", None, None, ("n2",), rank=1, code=1, signal=None)
        story.ends(Outcome.FAILED)
        story.train(450 + 100 * failed)
        story.checkpoint(400 + 100 * failed)
        story.rank_dies(460 + 100 * failed, node="n1")
        story.ends(Outcome.FAILED)
        story.now += 86_400
    assert story.state.status is not Status.HALTED


def test_a_node_that_is_excluded_after_the_launch_is_no_mismatch():
    story = Story().training(450)
    story.rank_dies(450)
    story.ends(Outcome.FAILED)
    attempt = story.state.attempt
    assert attempt is not None
    story.see(e.NodeExcluded(node=attempt.nodes[0], incident="operator", reason="found later"), seconds=5.0)
    closed = only(story.train(460), e.IncidentClosed)
    assert closed.proven, closed.proof


def test_one_standstill_is_one_page():
    story = Story(replace(POLICY, least_alert=Severity.PAGE)).training(450)
    story.signal("allocation_lost", 450, None, job="77", reason="NODE_FAIL")
    story.ends(Outcome.LOST)
    told = [event for _ in range(300) for event in story.see(seconds=60) if isinstance(event, e.AlertIntended)]
    assert len([alert for alert in told if "waiting" in alert.title]) <= 1


def test_what_is_missing_is_asked_for_in_parts_while_training_goes_on():
    nodes = tuple(f"n{number}" for number in range(1, 9))
    story = Story(shape=Shape(nodes=8, spares=8, ranks_per_node=1, min_nodes=4))
    story.begin()
    story.hold(*nodes)
    story.train(450)
    for _ in range(12):
        story.see(seconds=20)
        for name, each in story.state.allocations.items():
            if each.job is None:
                story.see(e.AllocationSubmitted(allocation=name, job=name, adopted=False))
    asked = [each.wanted for each in list(story.state.allocations.values())[1:]]
    assert sum(asked) == 8
    assert max(asked) == 2


def test_a_slightly_slow_rank_is_named_once_waiting_for_it_has_cost_enough():
    rule = StragglerRule(ratio=1.3, persist=50, slight=1.03, waits_seconds=300.0)
    busy = Busy(median=20.0, max=21.0, rank=5)
    detector = StragglerDetector(rule)
    found = [f for step in range(1, 1000) for f in detector.observe(at(step, busy=busy))]
    assert [(f.signal, f.step, f.onset_step, f.evidence["rank"]) for f in found] == [("straggler", 300, 1, 5)]
    jitter = StragglerDetector(rule)
    turns = [f for step in range(1, 5000) for f in jitter.observe(at(step, busy=replace(busy, rank=step // 40)))]
    assert turns == []


def test_checkpoints_that_are_gone_are_chosen_no_more():
    story = Story().training(450)
    run = story.state.run
    assert run is not None
    newest = list(story.state.checkpoints)[-1]
    story.see(e.CheckpointsGone(run=run.name, paths=(newest,)))
    story.rank_dies(450)
    launched = only(story.ends(Outcome.FAILED), e.AttemptIntended)
    assert launched.checkpoint is not None
    assert launched.checkpoint.step == 300
    gone = replace(launched.checkpoint, path=newest, step=400)
    story.write(e.CheckpointRefused(checkpoint=gone, why="the trainer found nothing there"))


def test_the_latest_result_is_kept_for_the_same_objects_only():
    calls: list[object] = []

    @memoize_recent
    def length(of: list[int]) -> int:
        calls.append(of)
        return len(of)

    some, other = [1, 2], [1, 2]
    assert [length(some), length(some), length(other), length(other)] == [2, 2, 2, 2]
    assert [each is some for each in calls] == [True, False]
