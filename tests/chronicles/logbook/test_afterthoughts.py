"""What later facts say of earlier entries: each kind from a journal of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chronicles.logbook.story.afterthoughts import afterthoughts, journaled_only
from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.record import load
from chronicles.report.build import build
from opt_ops.cli.run.explain_lines import explanation_lines
from opt_ops.core import events as e
from opt_ops.core.values import Action, Checkpoint, Driver, Outcome, ProposalStatus, Tier, Verdict
from tests.chronicles.told import Told, falling
from tests.core.story import Story

USUAL = {"loss": 9.0, "median": 2.0, "limit": 2.3}


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path / "12", steps=4000)


def thoughts(told: Told, telemetry: bool = True) -> dict[Later, Afterthought]:
    record = load(told.folder, telemetry=telemetry)
    found = afterthoughts(record, build(record))
    assert len({each.kind for each in found}) == len(found), found
    return {each.kind: each for each in found}


def begun(told: Told, *nodes: str, last: int = 200) -> Checkpoint:
    told.begin().plan("12.00").hold(*nodes).launch("12.00-a0").train("12.00-a0", 1, last)
    return told.save("12.00", 100)


def rolled_back(told: Told, point: Checkpoint, onset: int = 160, factor: float | None = 0.5) -> str:
    """From the newest attempt, which has trained past the onset."""
    attempt = told.state.attempt
    assert attempt is not None
    last = attempt.last_step or 0
    incident = told.incident("loss_spike", f"loss 9 at {last}", attempt.name, last, onset_step=onset, evidence=USUAL)
    told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=factor)
    told.end(attempt.name, Outcome.STOPPED, last)
    run = f"12.{len(told.state.runs):02d}"
    factors = [(point.step, factor)] if factor is not None else []
    told.plan(run, attempt.run, point, factors, incident, cause="spike")
    told.launch(f"{run}-a0", point, incident).train(f"{run}-a0", point.step + 1, point.step + 20)
    return told.close(incident).state.incidents[incident].name


def alert(told: Told, onset: int, loss: float = 9.0, signal: str = "loss_spike") -> str:
    """An alert of the newest attempt, at the step that it has reached; the anchor of its entry."""
    attempt = told.state.attempt
    assert attempt is not None
    raised = e.SignalRaised(
        signal=signal,
        tier=Tier.ALERT,
        attempt=attempt.name,
        step=attempt.last_step,
        onset_step=onset,
        at=told.now,
        rule="the rule",
        evidence={**USUAL, "loss": loss},
    )
    told.see(raised)
    return f"e{told.state.seq}"


def trained_to(told: Told, last: int, loss: Callable[[int], float | None] = falling) -> None:
    attempt = told.state.attempt
    assert attempt is not None
    told.train(attempt.name, (attempt.last_step or 0) + 1, last, loss)


@pytest.mark.parametrize(("height", "needed"), [(8.5, False), (5.6, False), (4.0, True)])
def test_a_jump_that_comes_again_and_heals_was_not_the_learning_rate(told: Told, height: float, needed: bool):
    incident = rolled_back(told, begun(told))
    trained_to(told, 164)
    anchor = alert(told, 163, height)
    trained_to(told, 300)
    found = thoughts(told).get(Later.HEALED_AGAIN)
    if needed:
        assert found is None, "less than half as high is another jump"
        return
    assert found is not None
    assert (found.anchor, found.verdict, found.because) == (incident, Judged.NOT_NEEDED, (anchor,))
    assert "came again at step 163" in found.text
    assert "the data of these batches, not the learning rate" in found.text
    assert found.text.endswith("It is still in force.")
    assert found.next is not None
    assert found.next.startswith("opt-ops run set 12 lr=0.0009"), "what the schedule alone gives at step 301"
    assert thoughts(told, telemetry=False)[Later.HEALED_AGAIN] == found
    lines = list(explanation_lines(build(load(told.folder)).incidents[0], [found]))
    assert f"  later     not needed: {found.text}" in lines[-2]
    assert f"; {anchor}]" in lines[-2]
    assert lines[-1] == f"            next: {found.next}"


def test_an_alert_at_another_step_does_not_acquit_the_learning_rate(told: Told):
    rolled_back(told, begun(told))
    trained_to(told, 168)
    alert(told, 166)
    trained_to(told, 300)
    assert Later.HEALED_AGAIN not in thoughts(told)


def test_the_journal_decides_first_whether_a_cut_was_needed(told: Told):
    incident = rolled_back(told, begun(told))
    told.see(e.AfterthoughtAdded(incident=incident, topic="not_needed", text="the spike came again and healed"))
    found = thoughts(told)[Later.HEALED_AGAIN]
    assert (found.verdict, found.because) == (Judged.NOT_NEEDED, ())
    assert found.text.startswith("The spike came again and healed.")
    record = load(told.folder)
    report = build(record)
    assert journaled_only(report.incidents[0], afterthoughts(record, report)) == (), "it is told once"


def test_a_place_that_was_passed(told: Told):
    incident = rolled_back(told, begun(told), factor=0.75)
    trained_to(told, 699)
    assert thoughts(told) == {}, "500 steps beyond it are not trained yet"
    trained_to(told, 700)
    found = thoughts(told)[Later.PASSED]
    assert (found.anchor, found.verdict, found.at) == (incident, Judged.WORKED, told.now)
    assert found.text == (
        "Training passed the place at three quarters of the learning rate and 500 steps more without an alert. "
        "Whether the learning rate or the other order of events did it is not known."
    )


def test_trouble_that_comes_back_at_the_same_place(told: Told):
    point = begun(told)
    first = rolled_back(told, point)
    trained_to(told, 460)
    second = rolled_back(told, point, onset=420)
    trained_to(told, 1200)
    record = load(told.folder)
    found = {each.anchor: each for each in afterthoughts(record, build(record))}
    assert (found[first].kind, found[first].verdict) == (Later.CAME_BACK, Judged.FAILED)
    assert found[first].because == (second,)
    assert "loss spike at step 420, 260 steps behind the first time" in found[first].text
    assert found[second].kind is Later.PASSED


def test_a_drill_that_was_rolled_back_is_not_judged(told: Told):
    point = begun(told)
    spike = told.incident("loss_spike", "loss 9", "12.00-a0", 200, onset_step=160, evidence=USUAL, drill="d001")
    told.decide(spike, Action.ROLLBACK, checkpoint=point, lr_factor=0.5)
    told.end("12.00-a0", Outcome.STOPPED, 200)
    told.plan("12.01", "12.00", point, [(100, 0.5)], spike, cause="drill").launch("12.01-a0", point, spike)
    told.train("12.01-a0", 101, 800)
    assert thoughts(told) == {}


def halted(told: Told, answer: e.Event) -> str:
    point = begun(told)
    told.end("12.00-a0", Outcome.STOPPED, 200).launch("12.00-a1", point).end("12.00-a1", Outcome.FAILED, None)
    incident = told.incident("process_death", "rank 5 on n1 left with code 1", "12.00-a1", None, nodes=("n1",))
    told.decide(incident, Action.HALT).see(e.LineageHalted(why="spent", incident=incident))
    told.see(answer, seconds=3600)
    told.launch("12.00-a2", point)
    return incident


def mended(reason: str) -> e.ResumeRequested:
    return e.ResumeRequested(request="r1", author="ann", reason=reason)


@pytest.mark.parametrize(
    ("reason", "said"), [("mended", "ann wrote: “mended”."), ("", "What was mended is not written down.")]
)
def test_what_halted_a_lineage_and_went_away(told: Told, reason: str, said: str):
    incident = halted(told, mended(reason))
    told.train("12.00-a2", 101, 1099)
    assert Later.NEVER_RETURNED not in thoughts(told)
    trained_to(told, 1300)
    found = thoughts(told)[Later.NEVER_RETURNED]
    assert (found.anchor, found.verdict) == (incident, Judged.WENT_AWAY)
    assert found.text == f"Rank died before its first step has not come again in the 1200 steps since. {said}"


def test_an_answer_that_changes_settings_proves_nothing_about_the_cause(told: Told):
    halted(told, e.ChangeRequested(request="r1", author="ann", reason="other", settings=("optim.clip_norm=0.5",)))
    told.train("12.00-a2", 101, 1300)
    assert Later.NEVER_RETURNED not in thoughts(told)


def test_what_halted_a_lineage_and_came_again(told: Told):
    incident = halted(told, mended("mended"))
    told.train("12.00-a2", 101, 150).end("12.00-a2", Outcome.FAILED, 150)
    trained = told.incident("process_death", "rank 7 on n1 left with code 1", "12.00-a2", 150, nodes=("n1",))
    assert Later.RETURNED not in thoughts(told), "it died while it trained: another failure"
    told.launch("12.00-a3", None, trained).end("12.00-a3", Outcome.FAILED, None)
    again = told.incident("process_death", "rank 7 on n1 left with code 1", "12.00-a3", None, nodes=("n1",))
    found = thoughts(told)[Later.RETURNED]
    assert (found.anchor, found.verdict) == (incident, Judged.FAILED)
    assert found.because[0] == again
    assert "came again" in found.text
    assert "after the answer" in found.text


def excluded(told: Told, kind: str = "process_death") -> str:
    """n1 is excluded because a rank died there, and training goes on elsewhere."""
    point = begun(told)
    told.end("12.00-a0", Outcome.FAILED, 200)
    incident = told.incident(kind, "rank 0 on n1 left with code 1", "12.00-a0", 200, nodes=("n1",))
    told.decide(incident, Action.RESTART, exclude=("n1",))
    told.see(e.NodeExcluded(node="n1", incident=incident, reason="rank 0 died"))
    told.launch("12.00-a1", point, incident, "n2", "n3").train("12.00-a1", 101, 150)
    return told.close(incident).state.incidents[incident].name


def allow(told: Told, **more: bool) -> str:
    told.see(e.NodeAllowed(request="r9", author="cy", node="n1", reason="tested", **more))
    return f"e{told.state.seq}"


def judged(verdict: Verdict, reason: str) -> e.NodeJudged:
    return e.NodeJudged(node="n1", host="n1", verdict=verdict, reason=reason, source="s", at=0.0)


def test_a_node_that_passes_a_test_after_it_was_excluded(told: Told):
    incident = excluded(told)
    anchor = allow(told, retested=True)
    found = thoughts(told)[Later.FIT_AFTER_ALL]
    assert (found.anchor, found.verdict, found.because) == (incident, Judged.INNOCENT, (anchor,))
    assert "n1 passed the test" in found.text


def test_a_node_that_passes_a_burn_in_after_it_was_excluded(told: Told):
    excluded(told)
    told.see(judged(Verdict.HEALTHY, "ok"))
    assert Later.FIT_AFTER_ALL not in thoughts(told), "readings without a test prove nothing"
    told.see(judged(Verdict.UNKNOWN, "burning_in"))
    told.see(judged(Verdict.HEALTHY, "ok"))
    assert "passed a burn-in" in thoughts(told)[Later.FIT_AFTER_ALL].text


@pytest.mark.parametrize(("hours", "fit"), [(23, False), (25, True)])
def test_a_node_that_trains_for_a_day_again(told: Told, hours: int, fit: bool):
    excluded(told)
    allow(told)
    told.end("12.00-a1", Outcome.STOPPED, 150)
    told.launch("12.00-a2", told.save("12.00", 150), None, "n1", "n2").train("12.00-a2", 151, 160)
    told.see(seconds=3600.0 * hours)
    told.train("12.00-a2", 161, 162)
    assert (Later.FIT_AFTER_ALL in thoughts(told)) is fit


def test_a_node_that_nobody_tested(told: Told):
    incident = excluded(told)
    found = thoughts(told)[Later.NEVER_RETESTED]
    assert (found.anchor, found.verdict, found.at) == (incident, Judged.OPEN, told.now)
    assert "n1 is still excluded, nothing is proven against it, and nobody has tested it." in found.text
    assert found.next == "opt-ops node allow 12 n1 --retest"
    allow(told)
    assert Later.NEVER_RETESTED not in thoughts(told)


def test_a_node_with_proof_against_it_needs_no_test(tmp_path: Path):
    sure = Told(tmp_path / "12")
    excluded(sure, "bad_gpu")
    assert thoughts(sure) == {}


@pytest.mark.parametrize(("hours", "node", "explained"), [(2, "n1", True), (25, "n1", False), (2, "n2", False)])
def test_a_death_that_a_later_failure_of_its_node_explains(told: Told, hours: int, node: str, explained: bool):
    begun(told)
    death = told.incident("process_death", "rank 0 on n1 left with code 1", "12.00-a0", 200, nodes=("n1",))
    told.see(seconds=3600.0 * hours)
    gpu = told.incident("bad_gpu", f"{node}: xid_79", None, None, nodes=(node,))
    found = thoughts(told).get(Later.EXPLAINED)
    assert (found is not None) is explained
    if found is not None:
        assert (found.anchor, found.verdict, found.because) == (death, Judged.EXPLAINED, (gpu,))
        assert found.text.startswith("The cause was probably the GPU that failed at ")
        assert thoughts(told, telemetry=False) == {Later.EXPLAINED: found}


def test_an_alert_that_healed_says_how_high_it_went_and_for_how_long(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 300)
    trained_to(told, 310, lambda step: 4.5 if step == 307 else 3.5)
    anchor = alert(told, 301)
    assert thoughts(told) == {}, "it is not back"
    trained_to(told, 330, lambda _: 2.1)
    found = thoughts(told)[Later.HEALED]
    assert (found.anchor, found.verdict, found.next) == (anchor, Judged.HEALED, None)
    assert found.text == "The loss went up to 4.50, usually 2.00, and was back below 2.30 after 10 steps, at step 311."


@pytest.mark.parametrize(("gained", "verdict"), [(300, Judged.WORKED), (10, Judged.FAILED)])
def test_training_on_fewer_nodes_is_weighed_against_its_restarts(told: Told, gained: int, verdict: Judged):
    point = begun(told)
    told.end("12.00-a0", Outcome.LOST, 200)
    lost = told.incident("allocation_lost", "job 77 ended", "12.00-a0", 200)
    told.decide(lost, Action.RESTART)
    told.see(e.SizeDecided(nodes=1, why="one came"))
    anchor = f"e{told.state.seq}"
    told.launch("12.00-a1", point, lost, "n1").train("12.00-a1", 101, 200 + gained).close(lost)
    assert Later.DEARER_THAN_WAITING not in thoughts(told), "it is not over"
    told.see(e.SizeDecided(nodes=2, why="all are back"), seconds=0)
    grown = told.incident("nodes_returned", "n2 is back", "12.00-a1", 200 + gained)
    told.decide(grown, Action.RESTART)
    point = told.save("12.00", 180 + gained)
    told.end("12.00-a1", Outcome.STOPPED, 200 + gained)
    told.launch("12.00-a2", point, grown).train("12.00-a2", 181 + gained, 190 + gained).close(grown)
    found = thoughts(told)[Later.DEARER_THAN_WAITING]
    assert (found.anchor, found.verdict, found.because) == (anchor, verdict, (grown,))
    assert f"{gained} steps were trained; 1 extra restart cost 20 steps" in found.text


def test_a_long_wait_beside_nodes_that_were_held(told: Told):
    begun(told, "n1", "n2")
    told.end("12.00-a0", Outcome.LOST, 200)
    lost = told.incident("silent_node", "n1: silent", "12.00-a0", 200, nodes=("n1",))
    told.decide(lost, Action.RESTART, exclude=("n1",))
    told.see(*(e.AllocationIntended(allocation=f"12-n{n}", nodes=1, exclude=("n1",)) for n in (1, 2)))
    assert told.state.status == "QUEUED"
    told.see(seconds=1200)
    told.see(e.NoteAdded(request="r2", author="ann", target="12", text="still waiting", correction=False))
    found = thoughts(told)[Later.DEARER_THAN_WAITING]
    assert (found.anchor, found.verdict) == (lost, Judged.OPEN)
    assert "with 1 of 2 nodes held, and trained nothing" in found.text, found.text


def refused(folder: Path, spike: bool, *later: Callable[[Story], object]) -> Afterthought | None:
    """The judgement of a proposal that bo declined at step 450: a rollback to step 300, or a restart."""
    story = Story().training(450)
    story.see(e.DriverChanged(request="r1", author="ann", driver=Driver.ASK, reason=""))
    if spike:
        story.spike(450, onset=410)
    else:
        story.rank_dies(450)
    said = {"proposal": "12-i000-p1", "incident": "12-i000", "author": "bo", "reason": "known", "step": 450}
    story.see(e.ProposalAnswered(status=ProposalStatus.DECLINED, request="r2", **said))
    for each in later:
        each(story)
    story.save(folder)
    record = load(folder)
    found = [each for each in afterthoughts(record, build(record)) if each.kind is Later.REFUSED]
    assert len(found) <= 1
    return found[0] if found else None


def resumed(story: Story) -> None:
    story.ends()
    story.see(e.ResumeRequested(request="r9", author="bo", reason="mended"), seconds=3600.0)
    story.train(420)


def rolled_back_by_hand(seconds: float) -> Callable[[Story], object]:
    asked = e.ChangeRequested(request="r9", author="bo", reason="", to_step=300)
    return lambda story: story.see(asked, seconds=seconds) and story.ends()


@pytest.mark.parametrize(
    ("spike", "later", "verdict", "said"),
    [
        (True, [lambda s: s.train(960), lambda s: s.checkpoint(960)], "right", "would have discarded 150 steps"),
        (True, [lambda s: s.train(960)], None, ""),
        (True, [lambda s: s.train(470), lambda s: s.spike(470, onset=460)], "costly", "loss spike at step 470"),
        (True, [lambda s: s.train(550), rolled_back_by_hand(3600.0)], "costly", "to step 300 after all: 100 steps"),
        (True, [rolled_back_by_hand(60.0)], None, ""),
        (False, [resumed], "costly", "Nothing trained for 1 h"),
        (False, [lambda s: s.train(480)], "right", "The attempt went on by itself, to step 480"),
        (False, [lambda s: s.ends()], None, ""),
    ],
    ids=["healed", "not shown", "came again", "rolled back", "instead", "stood", "went on", "stands"],
)
def test_a_refused_recovery_is_judged_by_what_came_of_it(
    tmp_path: Path, spike: bool, later: list[Callable[[Story], object]], verdict: str | None, said: str
):
    found = refused(tmp_path / "12", spike, *later)
    assert (found and found.verdict) == verdict
    if found is not None:
        assert found.text.startswith(f"The {'rollback' if spike else 'restart'} was declined by bo. ")
        assert said in found.text
