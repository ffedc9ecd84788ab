"""What later steps show is added to the incident that is over."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.decide.afterthoughts import Topic
from opt_ops.core.values import Severity, Tier
from opt_ops.runfolder import lineages
from tests.core.decide.test_causes import TOLD, Cause, again, digest_of, evidence_of, told
from tests.core.story import POLICY, Story


def afterthoughts(story: Story, incident: str) -> dict[str, str]:
    return {each.topic: each.text for each in story.state.incidents[incident].afterthoughts}


def test_tried_and_failed_beside_what_cured_it():
    story = Story().training(460)
    digest: dict[str, Any] = {"step": 440, "data": {"batch": 440, "last": 440, "still": False}}
    story.signal("loss_spike", 460, 440, digest=digest, **evidence_of("loss_spike"))
    again(story)
    told(story, Cause.BAD_DATA)
    first = afterthoughts(story, "12-i000")
    assert list(first) == [Topic.CAME_AGAIN]
    assert "tried: rollback to step 300, learning rate × 0.75 → loss spike again at step 440" in first["came_again"]
    assert "on the same data; see 12-i001" in first["came_again"]
    again(story, 900)
    assert afterthoughts(story, "12-i001") == {}, "500 steps without it are not trained yet"
    story.train(990)
    cured = afterthoughts(story, "12-i001")
    assert "rollback to step 300, batches 439 to 459 skipped → cured" in cured["cured"]
    assert "12-i000: rollback to step 300, learning rate × 0.75 → failed" in cured["cured"]
    assert story.decide() == [], "each is added once"


def test_a_cure_at_the_first_try_needs_no_afterthought():
    story = Story().training(460)
    told(story, Cause.BAD_DATA)
    again(story, 990)
    assert afterthoughts(story, "12-i000") == {}


def test_a_spike_that_comes_again_and_heals_shows_that_the_cut_was_not_needed():
    story = Story().training(460)
    story.spike(460, onset=440)
    again(story, 450)
    attempt = story.state.attempt.name
    story.see(
        e.SignalRaised(
            signal="loss_spike", tier=Tier.ALERT, attempt=attempt, step=448, onset_step=443, at=story.now, rule="test"
        )
    )
    story.train(600)
    assert afterthoughts(story, "12-i000") == {}, "a spike that returns has 200 steps"
    story.train(660)
    said = afterthoughts(story, "12-i000")["not_needed"]
    # 1e-3, falling to a tenth over 990 steps from step 10: at step 661 it is 4.082e-4 without the cut.
    assert said.endswith("opt-ops run set 12 lr=0.000408182"), said


def test_the_alert_names_the_likely_cause():
    story = Story(replace(POLICY, least_alert=Severity.WARNING)).training(460)
    told(story, Cause.BAD_DATA)
    (opened,) = [each.told for each in story.state.alerts.values() if "12-i000" in each.told.alert]
    assert "likely cause: bad data (" in opened.body


def test_a_journal_keeps_causes_and_afterthoughts(tmp_path: Path):
    story = Story().training(460)
    story.signal("loss_spike", 460, 440, digest=digest_of(TOLD[Cause.BAD_DATA], 1), **evidence_of("loss_spike"))
    again(story)
    told(story, Cause.BAD_DATA)
    story.save(tmp_path)
    read = lineages.state(tmp_path)
    assert read.incidents["12-i000"].causes == story.state.incidents["12-i000"].causes
    assert read.incidents["12-i000"].afterthoughts != ()
    assert read.signals == story.state.signals
