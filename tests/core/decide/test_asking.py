"""A person is asked before a recovery: one proposal at a time, one answer, and one action or none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.names import lineage_of
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, AskDefault, AskTerms, Driver, ProposalStatus, Severity, Verdict
from tests.core.story import POLICY, Story, kinds, only

PAGES = replace(POLICY, least_alert=Severity.WARNING)


def asking(terms: AskTerms | None = None, step: int = 450) -> Story:
    """A lineage that trains, and asks before it acts."""
    story = Story(PAGES).training(step)
    drive(story, Driver.ASK, terms)
    return story


def drive(story: Story, driver: Driver, terms: AskTerms | None = None) -> list[e.Event]:
    number = f"r-{driver}-{len(story.entries)}"
    return story.see(e.DriverChanged(request=number, author="ann", driver=driver, reason="", ask=terms))


def answer(story: Story, proposal: str, status: ProposalStatus, reason: str = "") -> list[e.Event]:
    incident = proposal.rpartition("-")[0]
    step = story.state.attempt.last_step if story.state.attempt else None
    said = e.ProposalAnswered(
        proposal=proposal,
        incident=incident,
        status=status,
        author="bo",
        reason=reason,
        step=step,
        request=f"r-{len(story.entries)}",
    )
    return story.see(said)


def approve(story: Story, proposal: str = "12-i000-p1") -> list[e.Event]:
    return answer(story, proposal, ProposalStatus.APPROVED)


def decline(story: Story, proposal: str = "12-i000-p1") -> list[e.Event]:
    return answer(story, proposal, ProposalStatus.DECLINED, "the data is fine")


def answers(story: Story) -> list[tuple[str, str]]:
    told = (entry.event for entry in story.entries)
    return [(event.proposal, str(event.status)) for event in told if isinstance(event, e.ProposalAnswered)]


def test_a_restart_is_proposed_and_nothing_is_touched():
    story = asking()
    made = only(story.rank_dies(450), e.ProposalMade)
    assert (made.proposal, made.incident, made.decided.action) == ("12-i000-p1", "12-i000", Action.RESTART)
    assert (made.default, made.deadline - story.now, made.trains) == (AskDefault.ACT, 120.0, False)
    assert made.step == 450
    assert story.see(seconds=60) == []
    assert story.state.attempt.stop_why is None
    assert lineage_of(made.proposal) == "12"


def test_an_approval_is_acted_on_at_once_and_once():
    story = asking()
    story.rank_dies(450)
    assert kinds(approve(story))[:2] == ["recovery_decided", "stop_intended"]
    decided = story.state.incidents["12-i000"].decision
    assert decided.why.startswith("approved by bo; ")
    assert only(story.ends(), e.AttemptIntended).checkpoint.step == 400
    assert only(story.train(410), e.IncidentClosed).proven
    assert story.see(seconds=500) == []


def test_a_second_answer_changes_nothing():
    story = asking()
    story.rank_dies(450)
    approve(story)
    decline(story)
    assert story.state.incidents["12-i000"].proposal.status is ProposalStatus.APPROVED
    assert not story.state.incidents["12-i000"].decision.advice


def test_where_nothing_trains_the_deadline_acts():
    story = asking()
    story.rank_dies(450)
    assert "attempt_intended" not in kinds(story.ends()), "the question is still open"
    assert story.see(seconds=110) == []
    late = story.see(seconds=10)
    assert kinds(late)[:2] == ["proposal_answered", "recovery_decided"]
    assert only(late, e.ProposalAnswered).status is ProposalStatus.EXPIRED
    assert only(late, e.AttemptIntended).attempt == "12.00-a1"


@pytest.mark.parametrize(
    ("kind", "evidence"),
    [("loss_spike", {"loss": 9.0, "median": 3.0}), ("loss_drift", {"level": 3.6, "best": 3.1})],
    ids=["loss_spike", "loss_drift"],
)
def test_where_training_goes_on_the_deadline_waits(kind: str, evidence: dict[str, float]):
    story = asking()
    made = only(story.signal(kind, 450, 410, **evidence), e.ProposalMade)
    assert (made.default, made.deadline - story.now, made.trains) == (AskDefault.WAIT, 1800.0, True)
    assert (made.decided.action, made.decided.checkpoint.step) == (Action.ROLLBACK, 300)
    late = story.see(seconds=1800)
    assert kinds(late) == ["proposal_answered", "recovery_decided", "incident_closed"]
    assert only(late, e.RecoveryDecided).advice
    assert story.state.attempt.stop_why is None
    assert kinds(story.train(500)) == [], "it is not asked again"


def test_a_straggler_may_wait_too():
    story = asking()
    made = only(story.signal("straggler", 450, 400, ("n2",), rank=1, ratio=1.5), e.ProposalMade)
    assert (made.default, made.deadline - story.now) == (AskDefault.WAIT, 1800.0)


def test_what_was_declined_is_not_done_nor_asked_again():
    story = asking()
    story.spike(450, onset=410)
    assert kinds(decline(story)) == ["recovery_decided", "incident_closed"]
    decided = story.state.incidents["12-i000"].decision
    assert decided.advice
    assert decided.why.startswith("declined by bo: the data is fine; ")
    assert story.spike(470, onset=410) == []
    assert story.see(seconds=7200) == []
    worse = only(story.spike(480, onset=470), e.ProposalMade)
    assert worse.proposal == "12-i001-p1", "another onset is another incident"


def test_a_declined_restart_leaves_the_lineage_standing_until_a_person_resumes_it():
    story = asking()
    story.rank_dies(450)
    story.ends()
    assert "attempt_intended" not in kinds(decline(story))
    assert "attempt_intended" not in kinds(story.see(seconds=600))
    assert "incident_opened" not in kinds(story.see(seconds=600))
    resumed = story.see(e.ResumeRequested(request="r9", author="bo", reason="mended"))
    assert only(resumed, e.AttemptIntended).attempt == "12.00-a1"


def test_the_end_that_follows_a_declined_restart_is_no_news():
    story = asking()
    story.rank_dies(450)
    decline(story)
    assert [kind for kind in kinds(story.ends()) if kind in ("incident_opened", "attempt_intended")] == []


def test_a_declined_hang_that_goes_on_and_dies_later_is_asked_about():
    story = asking()
    story.signal("hang", 450, 450, seconds=99.0, patience=30.0, phase="training")
    taken = e.StacksTaken(attempt="12.00-a0", incident="12-i000", groups=(), odd=(), silent=(), nodes=())
    story.see(taken)
    decline(story)
    story.train(480)
    assert only(story.rank_dies(480), e.ProposalMade).proposal == "12-i001-p1"


def test_a_hand_back_answers_what_was_declined():
    story = asking()
    story.rank_dies(450)
    story.ends()
    decline(story)
    assert "attempt_intended" in kinds(drive(story, Driver.DAEMON))


def test_what_cannot_wait_goes_before_what_can():
    story = asking()
    story.spike(450, onset=410)
    decided = story.rank_dies(460)
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    assert only(decided, e.ProposalMade).proposal == "12-i001-p1"
    assert story.state.incidents["12-i000"].decision.advice
    approve(story, "12-i001-p1")
    assert only(story.ends(), e.AttemptIntended).checkpoint.step == 400


def test_a_proposal_that_can_wait_ends_with_its_attempt():
    story = asking()
    story.spike(450, onset=410)
    decided = story.ends()
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    made = only(decided, e.ProposalMade)
    assert (made.incident, made.decided.action, made.default) == ("12-i001", Action.RESTART, AskDefault.ACT)


def test_a_proposal_whose_checkpoint_is_gone_is_made_anew():
    story = asking()
    story.spike(450, onset=410)
    gone = story.see(e.CheckpointsGone(run="12.00", paths=("/runs/12/12.00/checkpoints/step-00000300",)))
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    made = only(gone, e.ProposalMade)
    assert (made.proposal, made.decided.checkpoint.step) == ("12-i000-p2", 200)


def test_an_approval_that_no_longer_fits_is_asked_again():
    story = asking()
    story.spike(450, onset=410)
    story.write(e.CheckpointsGone(run="12.00", paths=("/runs/12/12.00/checkpoints/step-00000300",)))
    assert only(approve(story), e.ProposalMade).proposal == "12-i000-p2"
    assert story.state.incidents["12-i000"].decision is None


def test_another_incident_of_the_attempt_withdraws_it_and_both_are_asked():
    story = asking()
    story.rank_dies(450)
    decided = story.judge("n2", Verdict.BAD, "gpu_lost")
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    made = [event.proposal for event in decided if isinstance(event, e.ProposalMade)]
    assert made == ["12-i000-p2", "12-i001-p1"]
    approve(story, "12-i001-p1")
    assert "attempt_intended" not in kinds(story.ends()), "the other one is still open"
    approve(story, "12-i000-p2")
    assert story.state.attempt.name == "12.00-a1"


def test_a_restart_of_the_daemon_neither_ends_nor_prolongs_it():
    story = asking()
    made = only(story.rank_dies(450), e.ProposalMade)
    story.now += 60
    assert "proposal_answered" not in kinds(story.daemon(blind=5.0))
    assert story.state.incidents["12-i000"].proposal.made.deadline == made.deadline
    assert "recovery_decided" in kinds(story.see(seconds=made.deadline - story.now))


def test_a_clock_set_back_before_the_proposal_ends_it():
    story = asking()
    story.spike(450, onset=410)
    assert only(story.see(seconds=-3600), e.ProposalAnswered).status is ProposalStatus.EXPIRED


@pytest.mark.parametrize(
    ("terms", "seconds", "default"),
    [
        (AskTerms(), 1800.0, AskDefault.WAIT),
        (AskTerms(seconds=300.0), 300.0, AskDefault.WAIT),
        (AskTerms(default=AskDefault.ACT), 1800.0, AskDefault.ACT),
    ],
)
def test_the_operator_sets_the_terms(terms: AskTerms, seconds: float, default: AskDefault):
    story = asking(terms)
    made = only(story.spike(450, onset=410), e.ProposalMade)
    assert (made.deadline - story.now, made.default) == (seconds, default)
    late = story.see(seconds=seconds)
    assert only(late, e.RecoveryDecided).advice is (default is AskDefault.WAIT)


def test_only_the_named_actions_are_asked_about():
    story = asking(AskTerms(only=(Action.ROLLBACK,)))
    assert kinds(story.rank_dies(450)) == ["incident_opened", "recovery_decided", "stop_intended", "alert_intended"]


def test_a_spare_taken_out_a_halt_and_a_daemon_restart_are_never_asked():
    story = asking()
    assert "proposal_made" not in kinds(story.judge("n3", Verdict.BAD, "gpu_lost"))
    assert story.state.nodes["n3"].excluded_by == "12-i000"
    assert "proposal_made" not in kinds(story.daemon(blind=3.0))
    assert "lineage_halted" in kinds(story.rank_dies(450, code=78))


def test_where_a_person_drives_nothing_is_asked():
    story = Story(PAGES).training(450)
    drive(story, Driver.OPERATOR)
    assert only(story.rank_dies(450), e.RecoveryDecided).advice
    assert answers(story) == []


def test_handing_back_ends_the_question_and_acts():
    story = asking()
    story.spike(450, onset=410)
    decided = drive(story, Driver.DAEMON)
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    assert not only(decided, e.RecoveryDecided).advice


def test_taking_over_ends_the_question_and_advises():
    story = asking()
    story.spike(450, onset=410)
    assert only(drive(story, Driver.OPERATOR), e.RecoveryDecided).advice


def test_an_operators_change_goes_first_and_is_not_asked_about():
    story = asking()
    story.rank_dies(450)
    story.ends()
    change = e.ChangeRequested(request="r7", author="bo", reason="", to_step=200)
    decided = story.see(change)
    assert answers(story) == [("12-i000-p1", "withdrawn")]
    assert only(decided, e.AttemptIntended).checkpoint.step == 200
    assert "proposal_made" not in kinds(decided)


def test_a_stopped_lineage_asks_nothing():
    story = asking()
    story.spike(450, onset=410)
    story.see(e.StopRequested(request="r8", author="bo", reason="done"))
    assert story.state.status is Status.CANCELLED
    assert answers(story) == [("12-i000-p1", "withdrawn")]


def test_the_alert_says_what_until_when_and_how_to_answer():
    story = asking()
    told = [each for each in story.spike(450, onset=410) if isinstance(each, e.AlertIntended)]
    (page,) = [each for each in told if each.alert == "12-i000-p1/asked"]
    assert page.severity is Severity.PAGE
    for words in (
        "opt-ops run approve 12-i000-p1",
        "opt-ops run decline 12-i000-p1",
        "Z; without",
        "test",
        "proposal: back to step 300",
    ):
        assert words in page.body, page.body
    assert len([each for each in decline(story) if isinstance(each, e.AlertIntended)]) == 0


def test_the_alert_of_a_proposal_has_words_in_place_of_codes():
    story = asking()
    told = [each for each in story.judge("n2", Verdict.BAD, "xid_79") if isinstance(each, e.AlertIntended)]
    (page,) = [each for each in told if each.alert == "12-i000-p1/asked"]
    assert page.title.endswith("your answer is needed: n2: a GPU has fallen off the bus (Xid 79)")
    assert page.body.startswith("12-i000, bad GPU: n2: a GPU has fallen off the bus (Xid 79)\n")
    assert "bad_gpu" not in page.body
