"""What operators ask for, and who drives."""

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.next_run import factor_to
from opt_ops.core.schedule import PlannedLr, batch_of, expected_lr
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver, Outcome, Schedule, Shape, Skip, Verdict
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import OPTIMIZER, SCHEDULE, Story, kinds, only


def ask(story: Story, verb: str, **arguments: object) -> list[e.Event]:
    """The request goes the way of the inbox."""
    request = Request(
        request=f"r{len(story.entries)}", author="ann", verb=verb, arguments={"reason": "because", **arguments}
    )
    event = event_of(story.state, request)
    assert not isinstance(event, e.RequestRefused), event.why
    return story.see(event)


def refused(story: Story, verb: str, **arguments: object) -> str:
    request = Request(request="r", author="ann", verb=verb, arguments={"reason": "because", **arguments})
    event = event_of(story.state, request)
    assert isinstance(event, e.RequestRefused)
    return event.why


def test_a_pause_saves_first_gives_the_nodes_back_and_is_resumed():
    story = Story().training(450)
    assert kinds(ask(story, "pause")) == ["leave_intended"]
    assert "already paused by" in refused(story, "pause")
    assert kinds(story.checkpoint(451)) == ["stop_intended"]
    assert kinds(story.ends()) == ["lineage_paused", "release_intended"]
    assert story.state.status is Status.PAUSED
    assert story.state.incidents == {}
    assert kinds(ask(story, "resume")) == ["allocation_intended"]
    assert only(story.hold("m1", "m2", "m3"), e.AttemptIntended).checkpoint.step == 451
    assert story.state.status is Status.STARTING


def test_a_pause_may_keep_the_nodes():
    story = Story().training(450)
    ask(story, "pause", keep_nodes=True)
    story.checkpoint(451)
    assert kinds(story.ends()) == ["lineage_paused"]
    assert kinds(ask(story, "resume")) == ["attempt_intended"]


def test_a_rollback_by_hand_is_done_and_proven_like_any_other():
    story = Story().training(450)
    decided = ask(story, "change", to_step=250, lr_factor=0.5, skip_batches=60)
    recovery = only(decided, e.RecoveryDecided)
    assert (recovery.action, recovery.checkpoint.step) == (Action.ROLLBACK, 200)
    assert "stop_intended" in kinds(decided), "at once: what it trains now is thrown away"
    run = story.state.run
    assert [(f.step, f.factor) for f in run.lr_factors] == [(200, 0.5)]
    assert run.skips == (Skip(first=201, last=260),)
    story.ends()
    assert only(story.train(206), e.IncidentClosed).proven
    assert story.state.incidents["12-i000"].cause == "ann: because"


def test_a_learning_rate_set_by_hand_holds_from_the_next_update_on():
    story = Story().training(450)
    decided = ask(story, "change", lr=6e-5)
    assert only(decided, e.RecoveryDecided).save_first
    assert story.state.run.name == "12.00", "the next run is planned when it is known where it begins"
    story.checkpoint(460)
    launched = story.ends()
    assert only(launched, e.RunPlanned).checkpoint.step == 460
    assert expected_lr(SCHEDULE, story.state.run.lr_factors, 461) == pytest.approx(6e-5)
    assert only(story.train(466), e.IncidentClosed).proven


def test_settings_set_by_hand_are_proven_from_the_optimizer():
    story = Story().training(450)
    ask(story, "change", settings=["optim.clip_norm=0.5"])
    story.checkpoint(460)
    story.ends()
    assert story.state.run.settings == ("optim.clip_norm=0.5",)
    closed = only(story.train(466), e.IncidentClosed)
    assert not closed.proven, "the optimizer still clips at 1.0"
    assert "clip_norm=0.5" in closed.proof["mismatch"]
    assert story.state.status is Status.HALTED


def test_a_halted_lineage_goes_on_when_a_person_has_looked():
    story = Story()
    story.begin()
    story.hold()
    story.rank_dies(0, code=78)
    story.ends(Outcome.FAILED)
    assert story.state.status is Status.HALTED
    assert "the lineage is HALTED" in refused(story, "pause")
    ask(story, "resume")
    assert story.state.incidents["12-i000"].proven is None
    assert kinds(story.see(seconds=10)) == ["allocation_intended"]
    assert isinstance(story.hold("m1", "m2", "m3")[-1], e.AttemptIntended)
    decided = story.rank_dies(0, code=78)
    assert "0 of 1 actions" in only(decided, e.RecoveryDecided).why, "what went before is answered"


def test_a_rollback_out_of_halted():
    story = Story().training(450)
    for _ in range(4):
        story.rank_dies(450)
        if story.state.status is Status.HALTED:
            break
        story.ends(Outcome.FAILED)
        story.train(450)
    assert story.state.status is Status.HALTED
    story.ends()
    decided = ask(story, "change", to_step=200)
    assert only(decided, e.RunPlanned).checkpoint.step == 200


def test_while_a_person_drives_decisions_are_only_said():
    story = Story().training(450)
    ask(story, "drive", driver="person")
    assert story.state.driver is Driver.OPERATOR
    decided = story.judge("n2", Verdict.BAD, "xid_79")
    assert kinds(decided) == ["incident_opened", "recovery_decided", "incident_closed"]
    assert only(decided, e.RecoveryDecided).advice
    assert only(decided, e.IncidentClosed).proven is None
    assert story.state.attempt.stop_why is None
    assert story.state.nodes["n2"].excluded_by is None
    story.rank_dies(450)
    assert not any(isinstance(x, e.AttemptIntended) for x in story.ends(Outcome.FAILED)), "nothing starts by itself"
    assert only(ask(story, "resume"), e.AttemptIntended).nodes == ("n1", "n3")


def test_handed_back_the_daemon_goes_on_with_what_is_broken():
    story = Story().training(450)
    ask(story, "drive", driver="person")
    story.rank_dies(450)
    story.ends(Outcome.FAILED)
    assert only(ask(story, "drive", driver="daemon"), e.AttemptIntended).checkpoint.step == 400


def test_a_node_is_excluded_and_allowed_by_hand():
    story = Story().training(450)
    assert kinds(ask(story, "exclude", node="n3"))[:1] == ["drain_intended"]
    assert "already excluded by" in refused(story, "exclude", node="n3")
    assert story.state.attempt.stop_why is None
    ask(story, "allow", node="n3")
    assert story.state.nodes["n3"].excluded_by is None
    assert "not excluded" in refused(story, "allow", node="n3")


def test_an_allowed_node_that_fails_again_is_a_new_incident():
    story = Story().training(450)
    story.judge("n3", Verdict.BAD, "xid_48")
    ask(story, "allow", node="n3")
    assert only(story.judge("n3", Verdict.BAD, "xid_48"), e.IncidentOpened).incident == "12-i001"


def test_a_bad_gpu_is_remembered_by_its_uuid_until_its_node_is_allowed():
    story = Story().training(450)
    judged = e.NodeJudged(
        node="n3", host="n3", verdict=Verdict.BAD, reason="gpu_lost", source="t", at=1.0, evidence={"uuid": "GPU-7"}
    )
    story.see(judged)
    assert story.state.bad_parts == {"GPU-7": "n3"}
    ask(story, "allow", node="n3")
    assert story.state.bad_parts == {}


def test_what_cannot_be_is_refused_with_the_reason():
    story = Story().training(450)
    assert "no verified healthy checkpoint at or before step 50" in refused(story, "change", to_step=50)
    assert "must be above 0" in refused(story, "change", lr=-1)
    assert "there is nothing to resume" in refused(story, "resume")
    assert "the daemon already drives" in refused(story, "drive", driver="daemon")
    step = story.state.attempt.last_step
    assert f"resume at about step {step}" in refused(story, "change", settings=[f"steps={step}"])
    ask(story, "change", settings=[f"steps={step + 1}"])
    early = Story()
    early.begin()
    assert "has reported its schedule" in refused(early, "change", lr=1e-4)


@pytest.mark.parametrize(
    ("skips", "step", "batch"),
    [
        ((), 7, 7),
        ((Skip(first=3, last=4),), 2, 2),
        ((Skip(first=3, last=4),), 3, 5),
        ((Skip(first=3, last=4), Skip(first=6, last=6)), 4, 7),
        ((Skip(first=3, last=6), Skip(first=5, last=8)), 3, 9),
        ((Skip(first=5, last=8), Skip(first=3, last=6)), 3, 9),
        ((Skip(first=1, last=2),), 1, 3),
    ],
)
def test_the_batch_of_an_update(skips: tuple[Skip, ...], step: int, batch: int):
    assert batch_of(step, skips) == batch


def test_the_optimizer_of_the_story_is_the_one_that_is_compared():
    assert OPTIMIZER.clip_norm == 1.0


@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 1)])
def test_a_drill_on_a_rank_takes_one_that_exists(nodes: int, rank: int):
    story = Story(shape=Shape(nodes=nodes, spares=0, ranks_per_node=1))
    story.begin()
    story.hold(*("n1", "n2")[:nodes])
    story.train(20)
    event = event_of(story.state, Request(request="r", author="ann", verb="drill", arguments={"fault": "kill-rank"}))
    assert isinstance(event, e.DrillRequested)
    assert event.arguments == {"rank": rank}


def test_a_learning_rate_can_be_set_under_any_schedule_that_is_computed_but_not_where_it_is_zero():
    cosine = replace(SCHEDULE, kind="cosine", final_fraction=0.0)
    story = Story(schedule=cosine).training(450)
    ask(story, "change", lr=6e-5)
    story.checkpoint(460)
    story.ends()
    assert expected_lr(cosine, story.state.run.lr_factors, 461) == pytest.approx(6e-5)
    assert only(story.train(466), e.IncidentClosed).proven
    over = Story(schedule=replace(cosine, total_steps=400)).training(450)
    assert "after step 450 is 0, and a factor cannot raise it" in refused(over, "change", lr=6e-5)
    unknown = Story(schedule=Schedule(kind="greedy")).training(450)
    assert "'greedy'; opt-ops can only scale it: run rollback --lr-scale" in refused(unknown, "change", lr=6e-5)


def test_a_learning_rate_is_reached_at_the_first_update_whose_rate_is_not_zero():
    late = PlannedLr(schedule=replace(SCHEDULE, kind="cosine", delay=1))
    factor = factor_to(6e-5, late, 0)
    assert factor is not None
    assert (late.at(1), factor * (late.at(2) or 0.0)) == (0.0, pytest.approx(6e-5))
    assert factor_to(1e300, PlannedLr(schedule=replace(SCHEDULE, peak_lr=1e-30)), 5) is None, "no finite factor"
