"""What the supervisor decides, scenario by scenario, by the playbooks that ship."""

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, AllocationStatus, Fault, LrFactor, Outcome, Verdict
from tests.core.story import POLICY, Story, kinds, only


def test_a_lineage_asks_for_nodes_and_starts_when_enough_are_fit():
    story = Story()
    assert kinds(story.begin()) == ["run_planned", "allocation_intended"]
    assert story.state.allocation.wanted == 3
    launched = only(story.hold(), e.AttemptIntended)
    assert launched == e.AttemptIntended(
        attempt="12.00-a0", run="12.00", nodes=("n1", "n2"), ranks_per_node=1, checkpoint=None, incident=None
    )
    assert story.state.status is Status.STARTING
    story.train(10)
    assert story.state.status is Status.TRAINING


def test_no_attempt_starts_before_nodes_are_heard_of():
    story = Story()
    story.begin()
    story.see(e.AllocationSubmitted(allocation="12-n0", job="7", adopted=False))
    nodes = ("n1", "n2", "n3")
    running = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.RUNNING, nodes=nodes, reason="")
    assert story.see(running) == []
    assert story.judge("n1", Verdict.HEALTHY, "ok") == []
    assert story.judge("n2", Verdict.HEALTHY, "ok") == [], "the third gets a moment to join"
    assert kinds(story.see(seconds=POLICY.join_seconds)) == ["attempt_intended"]


def test_enough_nodes_wait_a_moment_for_the_last_ones():
    story = Story()
    story.begin()
    story.see(e.AllocationSubmitted(allocation="12-n0", job="7", adopted=False))
    nodes = ("n1", "n2", "n3")
    story.see(e.AllocationChanged(allocation="12-n0", status=AllocationStatus.RUNNING, nodes=nodes, reason=""))
    story.judge("n3", Verdict.HEALTHY, "ok")
    assert story.judge("n2", Verdict.HEALTHY, "ok") == []
    assert only(story.see(seconds=POLICY.join_seconds), e.AttemptIntended).nodes == ("n2", "n3")


def test_a_blind_node_is_used_only_where_no_gpus_are_expected():
    for gpus, starts in ((0, True), (8, False)):
        story = Story(replace(POLICY, expected_gpus=gpus))
        story.begin()
        story.see(e.AllocationSubmitted(allocation="12-n0", job="7", adopted=False))
        held = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.RUNNING, nodes=("n1", "n2"), reason="")
        story.see(held)
        story.judge("n1", Verdict.UNKNOWN, "nvml_absent")
        decided = story.judge("n2", Verdict.UNKNOWN, "nvml_absent")
        assert bool(decided) is starts


def test_a_silent_node_is_never_used_for_a_new_attempt():
    story = Story()
    story.begin()
    story.hold()
    story.train(50)
    story.judge("n3", Verdict.UNKNOWN, "silent")
    story.rank_dies(50)
    launched = only(story.ends(Outcome.FAILED), e.AttemptIntended)
    assert launched.nodes == ("n1", "n2")


@pytest.mark.parametrize(("unseen", "left_out", "proven"), [(2, True, True), (2, False, False), (11, True, False)])
def test_first_steps_that_no_reader_could_take_disprove_no_recovery(unseen: int, left_out: bool, proven: bool):
    story = Story().training(450)
    story.rank_dies(450)
    story.ends()
    if left_out:
        file, why = "12.00/a1/telemetry.jsonl", "line 1: `gnorm` is a list, not a number"
        story.see(e.InputLeftOut(source="telemetry", file=file, count=1, taken=0, first=why, newest=why))
    closed = only(story.train(420, unseen=unseen), e.IncidentClosed)
    assert closed.proven == proven
    assert closed.step_resumed == (400 if proven else 400 + unseen)


def test_a_dead_rank_restarts_the_same_run_from_the_newest_good_checkpoint():
    story = Story().training(450)
    assert kinds(story.rank_dies(450)) == ["incident_opened", "recovery_decided", "stop_intended"]
    launched = only(story.ends(), e.AttemptIntended)
    assert (launched.attempt, launched.run, launched.checkpoint.step) == ("12.00-a1", "12.00", 400)
    closed = only(story.train(410), e.IncidentClosed)
    assert closed.proven
    assert (closed.step_resumed, closed.steps_lost) == (400, 50)
    assert closed.seconds_down == pytest.approx(3.0, abs=2)


@pytest.mark.parametrize(
    ("nodes", "resumed"),
    [
        ((("n1", "n2"),), 440),  # either will do
        ((("n1", "n2"), ("n2", "n1")), 440),
        ((("n1", "n2"), ("n7", "n8")), 400),  # a part of it is on nodes that are not ours any more
    ],
)
def test_a_snapshot_is_chosen_where_the_nodes_that_have_it_take_part(nodes, resumed):
    story = Story().training(445)
    story.checkpoint(440, nodes=nodes)
    story.rank_dies(445)
    assert only(story.ends(), e.AttemptIntended).checkpoint.step == resumed


def test_of_a_snapshot_and_a_durable_checkpoint_of_one_step_the_snapshot_is_read():
    story = Story().training(445)
    story.checkpoint(400, nodes=(("n1", "n2"),))
    story.rank_dies(445)
    assert "snapshot" in only(story.ends(), e.AttemptIntended).checkpoint.path


def test_a_checkpoint_that_is_damaged_unhealthy_or_unread_is_never_chosen():
    story = Story().training(450, checkpoints=(100, 200))
    story.checkpoint(300, healthy=False)
    story.checkpoint(400, verify=False)
    story.rank_dies(450)
    assert story.ends() == [], "a newer checkpoint is under examination: wait for it"
    damaged = story.state.checkpoints["/runs/12/12.00/checkpoints/step-00000400"].checkpoint
    launched = only(story.see(e.CheckpointRefused(checkpoint=damaged, why="hash differs")), e.AttemptIntended)
    assert launched.checkpoint.step == 200


def test_the_wait_for_an_examination_ends():
    story = Story().training(450, checkpoints=(100,))
    story.checkpoint(400, verify=False)
    story.rank_dies(450)
    assert story.ends() == []
    launched = only(story.see(seconds=POLICY.examine_seconds + 1), e.AttemptIntended)
    assert launched.checkpoint.step == 100


def test_a_spike_rolls_back_before_the_onset_with_a_lower_learning_rate():
    story = Story().training(460)
    decided = story.spike(460, onset=410)
    recovery = only(decided, e.RecoveryDecided)
    assert (recovery.action, recovery.checkpoint.step, recovery.lr_factor) == (Action.ROLLBACK, 300, 0.75)
    planned = only(decided, e.RunPlanned)
    assert (planned.run, planned.parent, planned.lr_factors) == ("12.01", "12.00", (LrFactor(step=300, factor=0.75),))
    launched = only(story.ends(), e.AttemptIntended)
    assert (launched.attempt, launched.checkpoint.step) == ("12.01-a0", 300)
    closed = only(story.train(310), e.IncidentClosed)
    assert closed.proven
    assert closed.steps_lost == 160
    first = closed.proof["readbacks"][0]
    assert first["lr"] == first["expected_lr"]


def test_a_rollback_whose_learning_rate_is_not_in_force_halts():
    story = Story().training(460)
    story.spike(460, onset=410)
    story.ends()
    decided = story.train(310, lr_error=1 / 0.75)
    assert not only(decided, e.IncidentClosed).proven
    assert "learning rate" in only(decided, e.LineageHalted).why
    assert "stop_intended" in kinds(decided)


def test_optimizer_settings_that_came_back_from_the_checkpoint_halt():
    story = Story().training(460)
    story.spike(460, onset=410)
    story.ends()
    decided = story.train(310, betas=(0.9, 0.98))
    assert "betas=(0.9, 0.98)" in only(decided, e.LineageHalted).why


def test_without_a_checkpoint_before_the_onset_the_run_starts_from_scratch_and_says_so():
    story = Story().training(60, checkpoints=(50,))
    recovery = only(story.spike(90, onset=40), e.RecoveryDecided)
    assert recovery.checkpoint is None
    assert "from scratch" in recovery.why
    assert only(story.ends(), e.AttemptIntended).checkpoint is None
    assert story.state.run.lr_factors == (LrFactor(step=0, factor=0.75),)


def test_the_ladder_goes_down_at_the_same_place_and_ends_with_a_human():
    story = Story().training(460)
    factors = []
    for _ in range(3):
        recovery = only(story.spike(460, onset=410), e.RecoveryDecided)
        factors.append((recovery.rung, recovery.lr_factor, recovery.checkpoint.step if recovery.checkpoint else 0))
        story.ends()
        story.train(460)
    assert factors == [(0, 0.75, 300), (1, 0.67, 200), (2, 0.5, 100)]
    decided = story.spike(460, onset=410)
    assert only(decided, e.RecoveryDecided).action is Action.HALT
    assert story.state.status is Status.HALTED


def test_the_ladder_starts_anew_where_training_has_gone_far_enough():
    story = Story().training(460)
    story.spike(460, onset=410)
    story.ends()
    story.train(990)
    story.checkpoint(800)
    recovery = only(story.spike(990, onset=961), e.RecoveryDecided)
    assert (recovery.rung, recovery.lr_factor) == (0, 0.75)
    factors = story.state.run.lr_factors
    assert [f.factor for f in factors] == [0.75, 0.75], "the factor of the run before stays in force"


def test_a_drill_does_not_spend_the_ladder():
    story = Story().training(460)
    drill = e.DrillRequested(
        request="r1", author="ann", drill="d000", fault=Fault.LR, attempt="12.00-a0", arguments={"from_step": 400}
    )
    story.see(drill, e.DrillDone(drill="d000"))
    assert only(story.spike(460, onset=410), e.IncidentOpened).drill == "d000"
    story.ends()
    story.train(460)
    opened = story.spike(460, onset=410)
    assert only(opened, e.IncidentOpened).drill is None, "the drill was in the attempt before"
    assert only(opened, e.RecoveryDecided).rung == 0


def test_a_drift_that_a_drill_causes_is_the_drill_too():
    story = Story().training(460)
    drill = e.DrillRequested(
        request="r1", author="ann", drill="d000", fault=Fault.LR, attempt="12.00-a0", arguments={"from_step": 400}
    )
    story.see(drill, e.DrillDone(drill="d000"))
    assert only(story.signal("loss_drift", 460, 430, level=3.6, best=3.1), e.IncidentOpened).drill == "d000"


@pytest.mark.parametrize(
    ("fault", "signal", "onset", "drill"),
    [
        (Fault.NAN, "loss_scale_floor", 430, "d000"),
        (Fault.NAN, "loss_drift", 430, "d000"),
        (Fault.NAN, "loss_drift", 800, None),
        (Fault.LR, "bad_gpu", 430, None),
    ],
)
def test_what_begins_in_the_steps_of_a_drill_is_the_drill_whatever_saw_it(
    fault: Fault, signal: str, onset: int, drill: str | None
):
    story = Story().training(460)
    asked = e.DrillRequested(
        request="r1", author="ann", drill="d000", fault=fault, attempt="12.00-a0", arguments={"from_step": 400}
    )
    story.see(asked, e.DrillDone(drill="d000"))
    story.train(900)
    told = story.signal(signal, onset + 20, onset, level=3.6, best=3.1, loss_scale=1.0, floor=1.0)
    assert only(told, e.IncidentOpened).drill == drill


@pytest.mark.parametrize(("checkpoint", "drill"), [(440, "d000"), (400, "d000"), (300, None)])
def test_what_a_drill_did_to_the_weights_goes_on_in_the_next_attempt(checkpoint: int, drill: str | None):
    story = Story().training(460, checkpoints=(100, 200, checkpoint))
    asked = e.DrillRequested(
        request="r1", author="ann", drill="d000", fault=Fault.LR, attempt="12.00-a0", arguments={"from_step": 400}
    )
    story.see(asked, e.DrillDone(drill="d000"))
    story.rank_dies(460)
    story.ends()
    story.train(490)
    assert only(story.signal("loss_drift", 490, 470, level=3.6, best=3.1), e.IncidentOpened).drill == drill


def test_a_bad_gpu_in_use_moves_the_attempt_to_the_spare():
    story = Story().training(450)
    decided = story.judge("n2", Verdict.BAD, "xid_79")
    assert kinds(decided) == [
        "incident_opened",
        "recovery_decided",
        "node_excluded",
        "drain_intended",
        "stop_intended",
        "allocation_intended",
    ]
    story.see(e.NodeDrained(node="n2", done=True, why=""))
    assert only(story.ends(), e.AttemptIntended).nodes == ("n1", "n3")
    closed = only(story.train(410), e.IncidentClosed)
    assert closed.proven


def test_a_bad_gpu_on_a_spare_does_not_touch_training():
    story = Story().training(450)
    decided = story.judge("n3", Verdict.BAD, "ecc_uncorrected")
    assert only(decided, e.RecoveryDecided).action is Action.EXCLUDE
    assert "stop_intended" not in kinds(decided)
    closed = only(story.see(e.NodeDrained(node="n3", done=False, why="not permitted")), e.IncidentClosed)
    assert closed.proven
    assert closed.steps_lost == 0
    assert story.state.attempt.live


def test_many_bad_nodes_are_many_cases_not_one_ladder():
    story = Story(shape=replace(Story().shape, nodes=1, spares=5))
    story.begin()
    story.hold("n1", "n2", "n3", "n4", "n5", "n6")
    story.train(50)
    for node in ("n2", "n3", "n4", "n5"):
        story.judge(node, Verdict.BAD, "xid_79")
    assert not story.state.ended


def test_a_suspect_node_finishes_what_runs_and_gets_nothing_new():
    story = Story().training(450)
    assert story.judge("n2", Verdict.SUSPECT, "remap_pending") == []
    story.rank_dies(450, rank=0, node="n1")
    assert only(story.ends(), e.AttemptIntended).nodes == ("n1", "n3")


def test_a_silent_node_in_use_is_left_behind():
    story = Story().training(450)
    story.judge("n2", Verdict.UNKNOWN, "silent")
    decided = story.signal("silent_node", 450, None, ("n2",), seconds=31.0)
    assert only(decided, e.RecoveryDecided).exclude == ("n2",)
    story.see(e.NodeDrained(node="n2", done=False, why=""))
    assert only(story.ends(), e.AttemptIntended).nodes == ("n1", "n3")


def test_a_user_error_is_not_tried_again():
    story = Story()
    story.begin()
    story.hold()
    decided = story.rank_dies(0, code=78)
    assert only(decided, e.RecoveryDecided).action is Action.HALT
    assert story.state.status is Status.HALTED


def test_a_failure_that_nobody_foresaw_is_tried_once_again():
    story = Story().training(450)
    decided = only(story.signal("gremlins", 450), e.RecoveryDecided)
    assert (decided.playbook, decided.action) == ("unknown", Action.RESTART)
    story.ends()
    story.train(451)
    assert only(story.signal("gremlins", 451), e.LineageHalted)


def test_a_second_finding_about_the_same_attempt_is_a_consequence():
    story = Story().training(450)
    story.judge("n2", Verdict.BAD, "xid_79")
    assert story.rank_dies(450) == []
    assert len(story.state.incidents) == 1


def test_a_refused_checkpoint_is_passed_over_for_an_older_one():
    story = Story().training(450)
    story.rank_dies(450)
    story.ends()
    refused = story.state.attempt.checkpoint
    assert refused.step == 400
    story.see(e.CheckpointRefused(checkpoint=refused, why="the trainer refused it"))
    story.rank_dies(0, code=65)
    launched = only(story.ends(Outcome.FAILED), e.AttemptIntended)
    assert launched.checkpoint.step == 300
    assert [i.next_attempt for i in story.state.incidents.values()] == ["12.00-a2", "12.00-a2"]
    story.train(310)
    assert all(incident.proven for incident in story.state.incidents.values())


def test_a_lost_allocation_is_asked_for_again():
    story = Story().training(450)
    ended = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason="TIMEOUT")
    assert kinds(story.see(ended)) == ["allocation_intended"]
    story.signal("allocation_lost", 450, job="77", reason="TIMEOUT")
    assert story.ends(Outcome.LOST) == []
    assert story.state.status is Status.QUEUED
    assert only(story.hold(), e.AttemptIntended).checkpoint.step == 400


def test_lost_nodes_are_replaced_and_the_attempt_goes_on_with_nodes_of_two_allocations():
    story = Story().training(450)
    (asked,) = [x for x in story.judge("n3", Verdict.BAD, "xid_48") if isinstance(x, e.AllocationIntended)]
    assert (asked.nodes, asked.exclude) == (1, ("n1", "n2", "n3"))
    assert e.AllocationIntended not in map(type, story.judge("n2", Verdict.BAD, "xid_79")), "not at once again"
    again = only(story.see(seconds=10.0), e.AllocationIntended)
    assert (again.nodes, again.exclude) == (1, ("n1", "n2", "n3"))
    story.see(e.NodeDrained(node="n3", done=True, why=""), e.NodeDrained(node="n2", done=True, why=""))
    assert story.ends() == [], "one of two nodes is left"
    story.see(e.AllocationSubmitted(allocation=asked.allocation, job="78", adopted=False))
    story.changed(asked.allocation, "n4")
    assert only(story.judge("n4", Verdict.HEALTHY, "ok"), e.AttemptIntended).nodes == ("n1", "n4")
    story.train(460)
    assert all(incident.proven for incident in story.state.incidents.values())


def test_an_allocation_without_a_fit_node_is_given_back():
    story = Story().training(450)
    story.judge("n3", Verdict.BAD, "xid_48")
    story.see(e.AllocationSubmitted(allocation="12-n1", job="78", adopted=False))
    story.changed("12-n1", "n4")
    story.judge("n4", Verdict.BAD, "xid_79")
    released = only(story.see(seconds=POLICY.unfit_seconds + 1), e.ReleaseIntended)
    assert released.allocation == "12-n1"


def test_a_node_that_has_not_been_heard_is_waited_for_longer():
    story = Story()
    story.begin()
    story.see(e.AllocationSubmitted(allocation="12-n0", job="7", adopted=False))
    story.changed("12-n0", "n1", "n2")
    story.judge("n1", Verdict.HEALTHY, "ok")
    assert only(story.see(seconds=POLICY.unfit_seconds + 1), e.AllocationIntended).nodes == 1, "the spare"
    again = only(story.see(seconds=POLICY.preflight_seconds), e.AllocationIntended)
    assert (again.nodes, again.exclude) == (1, ("n1", "n2"))


def test_spares_that_nobody_has_are_not_waited_for_for_ever():
    story = Story()
    story.begin()
    story.see(e.AllocationSubmitted(allocation="12-n0", job="7", adopted=False))
    decided = story.see(seconds=POLICY.spare_seconds + 1)
    assert only(decided, e.ReleaseIntended).allocation == "12-n0"
    assert only(decided, e.AllocationIntended).nodes == 2
    ended = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason="CANCELLED")
    story.see(ended, e.AllocationSubmitted(allocation="12-n1", job="8", adopted=False))
    assert story.see(seconds=1e5) == [], "without spares it stays in the queue"
    decided = story.changed("12-n1", "n1", "n2")
    assert only(decided, e.AllocationIntended).nodes == 1, "now there is time to look for a spare"
    story.judge("n1", Verdict.HEALTHY, "ok")
    assert only(story.judge("n2", Verdict.HEALTHY, "ok"), e.AttemptIntended).nodes == ("n1", "n2")


def test_refused_submissions_are_tried_with_a_pause_and_then_halt():
    story = Story()
    story.begin()
    for number in range(POLICY.submit_tries):
        decided = story.see(e.AllocationFailed(allocation=f"12-n{number}", why="no such partition"))
        if number < POLICY.submit_tries - 1:
            assert decided == [], "not at once"
            again = only(story.see(seconds=POLICY.submit_wait_seconds + 1), e.AllocationIntended)
            assert again.nodes == 2, "no spares any more: training without them is better than not training"
    assert "no such partition" in only(decided, e.LineageHalted).why


def test_a_restarted_daemon_adopts_what_runs():
    story = Story().training(450)
    decided = story.daemon(blind=3.2)
    assert kinds(decided) == ["incident_opened", "recovery_decided"]
    assert story.state.attempt.live
    closed = only(story.train(470), e.IncidentClosed)
    assert (closed.proven, closed.steps_lost, closed.seconds_down) == (True, 0, 0.0)


def test_a_daemon_that_was_away_while_nothing_ran_missed_nothing():
    story = Story()
    story.begin()
    assert story.daemon(blind=100.0) == []
    story.hold()
    assert story.state.incidents == {}


def test_an_attempt_that_ends_early_without_a_finding_is_answered():
    story = Story().training(450)
    decided = story.ends(Outcome.COMPLETED)
    assert "no finding says why" in only(decided, e.IncidentOpened).cause
    assert story.state.attempt.name == "12.00-a1"


def test_the_last_step_completes_the_lineage_and_gives_the_nodes_back():
    story = Story().training(1000)
    story.checkpoint(1000)
    decided = story.ends(Outcome.COMPLETED)
    assert kinds(decided) == ["lineage_completed", "release_intended"]
    assert not story.state.finished
    story.see(e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason=""))
    assert story.state.finished


def test_an_operator_stops_it_and_nothing_starts_again():
    story = Story().training(450)
    decided = story.see(e.StopRequested(request="r9", author="ann", reason="wrong data"))
    assert kinds(decided) == ["lineage_cancelled", "stop_intended"]
    assert kinds(story.ends()) == ["release_intended"]
    story.see(e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason=""))
    assert story.state.finished
    assert story.see(seconds=1e6) == []
