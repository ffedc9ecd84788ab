"""What people on call must be able to count on: what is healthy is not stopped, nothing is tried for ever."""

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.policy import Policy, Rung
from opt_ops.core.decide.proof import with_settings
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, AllocationStatus, Driver, Outcome, Severity, Shape, Verdict
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import OPTIMIZER, POLICY, SCHEDULE, Story, kinds, only

CAPACITY = POLICY.capacity


def with_page(trigger: str, *ladder: Rung, actions: int | None = None) -> Policy:
    """The playbooks that ship, with another ladder or budget for one failure class."""
    page = POLICY.playbooks[trigger]
    budget = page.budget if actions is None else replace(page.budget, actions=actions)
    return replace(
        POLICY, playbooks={**POLICY.playbooks, trigger: replace(page, ladder=ladder or page.ladder, budget=budget)}
    )


# ---- while a person drives


def test_while_a_person_drives_a_time_limit_is_said_once_and_acted_on_when_the_daemon_drives_again():
    story = Story().training(450)
    story.see(e.DriverChanged(request="r1", author="ann", driver=Driver.OPERATOR, reason=""))
    story.changed("12-n0", "n1", "n2", "n3", ends_at=story.now + 1000)
    decided = story.see(seconds=1000 - CAPACITY.last_call_seconds + 1)
    assert kinds(decided) == ["incident_opened", "recovery_decided", "incident_closed"]
    assert only(decided, e.RecoveryDecided).advice
    assert story.see() == []
    handed = story.see(e.DriverChanged(request="r2", author="ann", driver=Driver.DAEMON, reason=""))
    assert "leave_intended" in kinds(handed)


# ---- budgets never stop what is healthy


def test_nodes_that_come_and_go_all_day_do_not_stop_training():
    policy = with_page("nodes_returned", actions=1)
    story = Story(policy, Shape(nodes=2, spares=0, ranks_per_node=1, min_nodes=1))
    story.begin()
    story.hold("n1", "n2")
    story.train(450)
    story.checkpoint(400)
    story.see(e.SizeDecided(nodes=3, why="nodes come"))
    story.checkpoint(450)
    story.ends(last_step=450)
    story.see(e.SizeDecided(nodes=2, why="and go"))
    story.train(460)
    decided = story.see(e.SizeDecided(nodes=3, why="and come"))
    assert only(decided, e.RecoveryDecided).action is Action.NOTIFY
    assert story.see() == [], "said once for each attempt"
    assert story.state.status is Status.TRAINING


def test_a_daemon_that_cannot_stay_alive_does_not_stop_training():
    story = Story(with_page("daemon_restart", actions=2)).training(450)
    for life in range(4):
        story.daemon(blind=1.0)
        story.train(451 + life)
    assert [i.decision.action for i in story.state.incidents.values()] == [Action.ADOPT] * 2 + [Action.NOTIFY] * 2
    assert story.state.status is Status.TRAINING


def test_a_bad_spare_is_taken_out_whatever_was_spent():
    story = Story(with_page("bad_gpu", actions=1)).training(450)
    story.judge("n1", Verdict.BAD, "xid_79")
    story.ends(last_step=451)
    story.train(460)
    story.hold("m1")
    decided = story.judge("m1", Verdict.BAD, "xid_79")
    assert only(decided, e.RecoveryDecided).action is Action.EXCLUDE
    assert story.state.status is Status.TRAINING


# ---- pages that ask for what makes no sense


def test_a_page_that_only_tells_people_of_a_dead_attempt_does_not_restart_it_for_ever():
    story = Story(with_page("process_death", Rung(action=Action.NOTIFY))).training(450)
    story.rank_dies(451)
    decided = story.ends(Outcome.FAILED, 451)
    assert "lineage_halted" in kinds(decided)
    assert "attempt_intended" not in kinds(decided)


def test_a_page_that_rolls_back_what_trains_nothing_takes_the_node_out():
    for exclude, action in ((True, Action.EXCLUDE), (False, Action.NOTIFY)):
        rung = Rung(action=Action.ROLLBACK, margin_steps=100, exclude=exclude)
        story = Story(with_page("bad_gpu", rung)).training(450)
        decided = story.judge("n3", Verdict.BAD, "xid_79")
        assert only(decided, e.RecoveryDecided).action is action
        assert story.state.status is Status.TRAINING


# ---- leaving


def paused(story: Story) -> Story:
    story.see(e.PauseRequested(request="r1", author="ann", reason="", keep_nodes=True))
    assert story.state.attempt.leave_at is not None
    return story


def test_a_checkpoint_of_before_the_order_to_leave_does_not_end_the_leave():
    story = paused(Story().training(450))
    assert story.checkpoint(440) == [], "its save was under way; ten steps are not in it"
    assert kinds(story.checkpoint(450)) == ["stop_intended"]


def test_a_snapshot_on_the_disks_of_nodes_that_are_left_does_not_end_the_leave():
    story = paused(Story().training(450))
    assert story.checkpoint(460, nodes=(("n1", "n2"),)) == []
    assert kinds(story.checkpoint(460)) == ["stop_intended"]


# ---- a clock that is set back


def test_a_clock_that_is_set_back_holds_no_request_for_nodes_up():
    story = Story()
    story.begin()
    story.hold()
    story.now -= 3600
    assert "allocation_intended" in kinds(story.changed("12-n0", status=AllocationStatus.ENDED))


def test_a_clock_that_is_set_back_holds_no_leave_and_no_launch_up():
    story = paused(Story().training(450))
    story.now -= 3600
    assert kinds(story.see()) == ["stop_intended"]
    story.ends()
    story.see(e.ResumeRequested(request="r2", author="ann", reason=""))
    story = Story().training(450)
    story.checkpoint(440, verify=False)
    story.now -= 3600
    story.rank_dies(451)
    assert only(story.ends(Outcome.FAILED, 451), e.AttemptIntended).checkpoint.step == 400


# ---- nobody waits in silence


def test_nodes_that_come_and_go_without_training_anything_are_a_page_after_half_an_hour():
    story = Story(replace(POLICY, least_alert=Severity.INFO))
    story.begin()
    told: list[e.Event] = []
    for job in range(6):
        allocation = story.state.allocation.name
        story.see(e.AllocationSubmitted(allocation=allocation, job=str(job), adopted=False))
        story.changed(allocation, "n1", "n2", "n3")
        told += story.see(seconds=CAPACITY.page_seconds / 3)
        told += story.changed(allocation, status=AllocationStatus.ENDED)
        told += story.see(seconds=CAPACITY.top_up_seconds)
    pages = [each for each in told if isinstance(each, e.AlertIntended)]
    assert [page.severity for page in pages] == [Severity.PAGE], "once"
    assert "waiting for nodes" in pages[0].title


# ---- nothing starts over without a request


def test_a_rollback_that_finds_no_checkpoint_late_in_training_asks_a_person():
    story = Story().training(100_000, checkpoints=(99_900,))
    decided = story.spike(100_000, 99_850)
    assert only(decided, e.RecoveryDecided).action is Action.HALT
    assert "would lose more than 2000 steps" in story.state.why
    assert "run_planned" not in kinds(decided)


def test_a_rollback_whose_margin_reaches_back_over_all_training_asks_a_person():
    """The oldest checkpoint is as good as from scratch."""
    story = Story().training(100_000, checkpoints=(300, 99_900))
    decided = story.signal("loss_spike", 100_000, 99_950, margin=200_000, loss=9.0, median=3.0)
    assert only(decided, e.RecoveryDecided).action is Action.HALT
    assert "the oldest verified healthy one would lose more than 2000 steps" in story.state.why


def test_the_oldest_checkpoint_is_taken_where_it_is_no_more_than_2000_steps_before_the_onset():
    story = Story().training(100_000, checkpoints=(98_000, 99_900))
    decided = story.signal("loss_spike", 100_000, 99_950, margin=2500, loss=9.0, median=3.0)
    checkpoint = only(decided, e.RecoveryDecided).checkpoint
    assert checkpoint is not None
    assert checkpoint.step == 98_000


def test_a_launch_whose_checkpoints_are_hidden_waits_for_them_and_then_for_a_person():
    for back in (True, False):
        story = Story().training(100_000, checkpoints=(99_900,))
        story.see(e.CheckpointsGone(run="12.00", paths=tuple(story.state.checkpoints)))
        story.rank_dies(100_000)
        assert story.ends(Outcome.FAILED, 100_000) == []
        if back:
            assert only(story.checkpoint(99_900), e.AttemptIntended).checkpoint.step == 99_900
        else:
            assert "lineage_halted" in kinds(story.see(seconds=POLICY.examine_seconds))


# ---- requests that make no sense


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("change", {"reason": "", "to_step": float("inf")}),
        ("drill", {"fault": "kill-rank", "rank": float("inf")}),
        ("exclude", {"node": "", "reason": ""}),
        ("exclude", {"node": "n1,n2", "reason": ""}),
        ("exclude", {"node": "n[1-9]", "reason": ""}),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_ends_no_daemon(verb: str, arguments: dict[str, object]):
    state = Story().training(450).state
    request = Request(request="r", author="ann", verb=verb, arguments=arguments)
    assert isinstance(event_of(state, request), e.RequestRefused)


@pytest.mark.parametrize("value", ["1e3", "soon", "inf", ""])
def test_a_setting_that_is_no_number_ends_no_daemon(value: str):
    schedule, optimizer = with_settings(SCHEDULE, OPTIMIZER, (f"optim.warmup_steps={value}", "optim.clip_norm=0.5"))
    assert optimizer.clip_norm == 0.5
    assert schedule.warmup_steps == (1000 if value == "1e3" else SCHEDULE.warmup_steps)
