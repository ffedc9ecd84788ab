"""Nodes come and go: top-ups, time limits, shrinking, growing."""

import dataclasses

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import AllocationStatus, Outcome, Shape, Verdict
from tests.core.story import POLICY, Story, kinds, only

CAPACITY = POLICY.capacity


def ends_at(story: Story, seconds: float) -> Story:
    """The first allocation turns out to have a time limit."""
    story.changed("12-n0", "n1", "n2", "n3", ends_at=story.now + seconds)
    return story


def successor(story: Story, name: str = "12-n1", *nodes: str) -> list[e.Event]:
    story.see(e.AllocationSubmitted(allocation=name, job="78", adopted=False))
    decided = story.changed(name, *(nodes or ("m1", "m2", "m3")), ends_at=story.now + 1e6)
    return decided + [d for node in nodes or ("m1", "m2", "m3") for d in story.judge(node, Verdict.HEALTHY, "ok")]


def test_a_successor_is_asked_for_before_the_time_limit_and_the_attempt_saves_and_moves():
    story = ends_at(Story().training(450), 40_000)
    assert story.see(seconds=40_000 - CAPACITY.successor_seconds - 100) == []
    asked = only(story.see(seconds=200), e.AllocationIntended)
    assert asked.nodes == 3
    assert asked.exclude == (), "on a full cluster only these nodes may come free"
    decided = successor(story)
    opened = only(decided, e.IncidentOpened)
    assert opened.failure == "time_limit"
    assert only(decided, e.RecoveryDecided).save_first
    assert isinstance(decided[-1], e.LeaveIntended)
    assert story.state.status is Status.TRAINING, "it trains until it has saved"
    story.train(470)
    assert kinds(story.checkpoint(465)) == ["stop_intended"]
    launched = only(story.ends(), e.AttemptIntended)
    assert launched.nodes == ("m1", "m2")
    assert launched.checkpoint.step == 465
    decided = story.train(466)
    assert only(story.train(471), e.IncidentClosed).proven
    assert story.state.incidents["12-i000"].steps_lost == 5
    assert story.state.allocations["12-n0"].release_at, "nobody needs it any more"


def test_without_a_successor_it_saves_and_leaves_at_the_last_call():
    story = ends_at(Story().training(450), 40_000)
    story.see(seconds=40_000 - CAPACITY.successor_seconds + 1)
    decided = story.see(seconds=CAPACITY.successor_seconds - CAPACITY.last_call_seconds)
    assert "no other nodes yet" in only(decided, e.IncidentOpened).cause
    assert story.see(seconds=CAPACITY.leave_seconds - 1) == []
    assert kinds(story.see(seconds=2)) == ["stop_intended"], "the checkpoint did not come"
    assert story.ends() == [], "nothing starts on an allocation that ends in a minute"


def test_a_short_allocation_looks_for_its_successor_in_its_last_quarter_only():
    story = ends_at(Story().training(450), 1000)
    assert story.see(seconds=700) == []
    assert only(story.see(seconds=60), e.AllocationIntended).nodes == 3


def test_a_job_that_ends_after_the_attempt_has_left_is_no_second_incident():
    story = ends_at(Story().training(450), 40_000)
    story.see(seconds=40_000 - CAPACITY.last_call_seconds + 1)
    story.see(seconds=30)
    story.changed("12-n0", status=AllocationStatus.ENDED)
    story.ends(Outcome.LOST)
    assert [incident.kind for incident in story.state.incidents.values()] == ["time_limit"]


def small(minimum: int) -> Story:
    return Story(shape=Shape(nodes=2, spares=0, ranks_per_node=1, min_nodes=minimum))


def lose_a_node(story: Story) -> None:
    story.begin()
    story.hold("n1", "n2")
    story.train(450)
    story.checkpoint(400)
    story.judge("n2", Verdict.BAD, "xid_79")
    story.see(e.NodeDrained(node="n2", done=True, why=""))
    assert story.ends() == []


def test_training_goes_on_with_fewer_nodes_where_that_is_allowed_and_grows_again():
    story = small(1)
    lose_a_node(story)
    assert story.see(seconds=CAPACITY.shrink_seconds - 5) == []
    decided = story.see(seconds=10)
    assert only(decided, e.SizeDecided).nodes == 1
    assert only(decided, e.AttemptIntended).nodes == ("n1",)
    story.train(460)
    assert all(incident.proven for incident in story.state.incidents.values())
    successor(story, "12-n1", "m1")
    assert story.state.attempt.leave_at is None, "it has only just begun"
    decided = story.see(seconds=CAPACITY.grow_seconds + 1)
    assert only(decided, e.SizeDecided).nodes == 2
    assert only(decided, e.IncidentOpened).failure == "nodes_returned"
    assert kinds(story.checkpoint(465)) == ["stop_intended"]
    assert only(story.ends(), e.AttemptIntended).nodes == ("n1", "m1")


def test_training_waits_where_fewer_nodes_are_not_allowed():
    story = small(0)
    lose_a_node(story)
    assert story.see(seconds=CAPACITY.shrink_seconds * 10) == []
    assert story.state.status is not Status.HALTED


def test_a_stray_job_is_remembered_until_it_is_cancelled():
    story = Story().training(450)
    story.see(e.StrayFound(job="99", allocation="12-n0"))
    assert story.state.orphan_jobs == {"99": "12-n0"}
    story.see(e.StrayCancelled(job="99"))
    assert story.state.orphan_jobs == {}


def test_no_more_nodes_are_taken_out_in_an_hour_than_the_limits_say():
    cap = POLICY.limits.cordon_per_hour
    nodes = tuple(f"n{i}" for i in range(1, cap + 4))
    story = Story(shape=Shape(nodes=2, spares=cap + 1, ranks_per_node=1))
    story.begin()
    story.hold(*nodes)
    story.train(450)
    story.checkpoint(400)
    for node in nodes[2:]:
        story.judge(node, Verdict.BAD, "xid_79")
    excluded = [name for name, node in story.state.nodes.items() if node.excluded_by]
    assert excluded == list(nodes[2 : 2 + cap])
    later = story.see(seconds=3601)
    assert only(later, e.NodeExcluded).node == nodes[-1], "when the hour is over"


def test_drills_do_not_count_against_the_cordon_limit():
    policy = dataclasses.replace(POLICY, limits=dataclasses.replace(POLICY.limits, cordon_per_hour=1))
    story = Story(policy).training(450)
    story.judge("n3", Verdict.BAD, "xid_79", drill="d000")
    story.judge("n2", Verdict.BAD, "xid_79")
    assert [name for name, node in story.state.nodes.items() if node.excluded_by] == ["n2", "n3"]
