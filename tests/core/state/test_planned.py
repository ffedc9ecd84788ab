"""What counts as planned: what people and trainers declare, and what attempts begin with; no recovery does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.planned import parse_planned, planned_changes
from opt_ops.core.values import PlannedChange, Severity
from tests.core.story import OPTIMIZER, POLICY, SCHEDULE, Story


def steps(story: Story) -> list[tuple[int, str]]:
    return [(each.step, each.what) for each in planned_changes(story.state)]


def configured(story: Story, data: str | None = None, *planned: PlannedChange) -> None:
    """The newest attempt says what it trains on, and what it plans."""
    attempt = story.state.attempt
    assert attempt is not None
    story.see(
        e.AttemptConfigured(
            attempt=attempt.name,
            steps=1000,
            schedule=SCHEDULE,
            optimizer=OPTIMIZER,
            versions={},
            layout={},
            planned=planned,
            data=data,
        )
    )


def restarted(story: Story, last_step: int, data: str | None = None, *planned: PlannedChange) -> None:
    """The attempt's rank dies, and the next attempt goes on from the newest checkpoint."""
    story.rank_dies(last_step)
    story.ends(last_step=last_step)
    configured(story, data, *planned)


def asked(story: Story, checkpoint: int | None = None, **what: object) -> None:
    """A person asks for the next run, and it begins; `checkpoint` is what the attempt saves first."""
    story.see(e.ChangeRequested(request=f"r{len(story.state.changes)}", author="ann", reason="x", **what))
    if checkpoint is not None:
        story.checkpoint(checkpoint)
    story.ends(last_step=450)


@pytest.mark.parametrize(("text", "step", "what"), [("48000", 48000, ""), ("7:data stage: b", 7, "data stage: b")])
def test_a_declaration_is_a_step_and_words(text: str, step: int, what: str):
    assert parse_planned(text) == PlannedChange(step=step, what=what)


@pytest.mark.parametrize("text", ["", "0", "-3", "x", "1.5", "stage-b", "٣", "1" * 11])
def test_what_is_no_step_is_refused(text: str):
    with pytest.raises(ValueError, match="STEP"):
        parse_planned(text)


def test_nothing_is_planned_by_a_healthy_run_a_restart_or_a_playbook():
    story = Story().training()
    configured(story, "sha256:a")
    restarted(story, 450, "sha256:a")
    story.train(480)
    story.spike(480, 470)
    story.ends(last_step=480)
    configured(story, "sha256:a")
    assert story.state.run is not None
    assert story.state.run.lr_factors, "the playbook lowered the learning rate"
    assert steps(story) == []


def test_operators_declare_before_the_start_and_at_any_time_after():
    story = Story()
    story.daemon()
    started = e.LineageStarted(
        request="r0",
        author="ann",
        lineage="12",
        recipe="opt-tiny",
        settings=(),
        shape=story.shape,
        planned=(PlannedChange(step=600, what="stage b", by="ann"),),
    )
    story.see(started)
    story.hold()
    story.train(450)
    decided = story.see(
        e.ChangesDeclared(request="r1", author="bob", reason="x", planned=(PlannedChange(step=440, by="bob"),))
    )
    assert decided == [], "nothing is restarted"
    assert steps(story) == [(440, ""), (600, "stage b")]


def test_what_the_trainer_plans_counts_for_the_steps_that_lead_to_the_newest_attempt():
    story = Story().training()
    configured(story, None, PlannedChange(step=350, what="b"), PlannedChange(step=700, what="c"))
    assert steps(story) == [(350, "b"), (700, "c")]
    restarted(story, 450, None, PlannedChange(step=800, what="c"))
    assert steps(story) == [(350, "b"), (800, "c")], "it is resumed at step 400, and plans again from there"


def test_other_data_is_planned_from_the_attempt_on_that_has_it_and_from_no_later_one():
    story = Story().training()
    configured(story, "sha256:a")
    restarted(story, 450, "sha256:b")
    assert steps(story) == [(401, "other data")]
    restarted(story, 450, "sha256:b")
    assert steps(story) == [(401, "other data")], "it begins at the same step again"
    story.train(480)
    configured(story, "sha256:b")
    story.checkpoint(470)
    restarted(story, 480, "sha256:b")
    assert steps(story) == [(401, "other data")]
    restarted(story, 480)
    assert steps(story) == [(401, "other data")], "a trainer that does not say has not changed it"


def test_other_data_that_nobody_asked_for_is_told_once():
    story = Story(replace(POLICY, least_alert=Severity.WARNING)).training()
    configured(story, "sha256:a")
    restarted(story, 450, "sha256:a")
    assert not [alert for alert in story.state.alerts if "other_data" in alert]
    for _ in range(2):
        restarted(story, 450, "sha256:b")
        story.see(seconds=1)
        assert len([alert for alert in story.state.alerts if "12/other_data/400/" in alert]) == 1


def test_other_data_that_was_declared_is_not_told():
    story = Story(replace(POLICY, least_alert=Severity.WARNING)).training()
    configured(story, "sha256:a")
    planned = (PlannedChange(step=401, what="new mix", by="ann"),)
    story.see(e.ChangesDeclared(request="r1", author="ann", reason="x", planned=planned))
    restarted(story, 450, "sha256:b")
    story.see(seconds=1)
    assert not [alert for alert in story.state.alerts if "other_data" in alert]


def test_settings_that_may_change_the_loss_are_planned_and_others_are_not():
    story = Story().training()
    asked(story, 450, settings=("steps=2000", "log_every=5", "checkpoint.keep=3", "parallel.tp=2"))
    assert steps(story) == []
    story.train(500)
    asked(story, 500, settings=("data.global_batch=16", "optim.betas=0.9,0.98"))
    assert steps(story) == [(501, "data.global_batch=16, optim.betas=0.9,0.98")]
    story.train(520)
    story.checkpoint(510)
    restarted(story, 520)
    assert steps(story) == [(501, "data.global_batch=16, optim.betas=0.9,0.98")]


def test_a_rollback_by_hand_that_takes_settings_back_plans_nothing_where_they_were_not_in_force():
    story = Story().training()
    asked(story, 450, settings=("optim.clip_norm=0.5",))
    story.train(500)
    asked(story, to_step=300)
    assert steps(story) == [], "step 301 was trained like this before"
    story.train(350)
    asked(story, to_step=200, settings=("optim.clip_norm=0.3",), keep_later=True)
    assert steps(story) == [(201, "optim.clip_norm=0.3")]


@pytest.mark.parametrize(
    ("asks", "what"),
    [({"lr_factor": 0.5}, "learning rate"), ({"skip_batches": 60}, "60 batches skipped"), ({}, None)],
)
def test_a_rollback_by_hand_is_planned_if_it_changes_the_rate_or_the_data(asks: dict[str, float], what: str | None):
    story = Story().training()
    asked(story, to_step=300, **asks)
    assert steps(story) == ([(301, what)] if what else [])


def test_a_person_who_lets_a_halted_lineage_go_on_is_believed():
    story = Story().training()
    while story.state.status != "HALTED":  # until the ladder ends
        story.spike(450, 440)
        story.ends(last_step=450)
        story.train(450)
    story.ends(last_step=450)
    story.see(e.ResumeRequested(request="g", author="ann", reason="it is fine"))
    story.hold()
    goes_on = [each for each in planned_changes(story.state) if each.by == "ann"]
    assert [each.what for each in goes_on] == ["resumed"]
    attempt = story.state.attempt
    assert attempt is not None
    assert goes_on[0].step == (attempt.checkpoint.step if attempt.checkpoint else 0) + 1


def test_more_may_be_known_of_the_newest_attempt_than_the_journal_says():
    story = Story().training()
    attempt = story.state.attempt
    assert attempt is not None
    known = replace(attempt, planned=(PlannedChange(step=350, what="b"),))
    assert [each.step for each in planned_changes(story.state, known)] == [350]
