"""Probes on idle nodes: when they are begun, what they show, and that nothing waits for them for ever."""

from dataclasses import replace

import pytest

from opt_ops import playbook_loader
from opt_ops.core import events as e
from opt_ops.core.decide.policy import Policy, ProbeRule
from opt_ops.core.decide.probes import CERTAIN, died, verdict
from opt_ops.core.detect.onset import Place, onset_digest
from opt_ops.core.detect.point import Point
from opt_ops.core.events.probes import ProbeKind
from opt_ops.core.failures.causes import Cause
from opt_ops.core.values import Action, LrFactor, Outcome, Shape, Skip
from opt_ops.playbook_loader import PlaybookError
from opt_ops.supervise.executor import Site, orders_of
from tests.core.curve import curve
from tests.core.story import POLICY, Story, kinds, only

ONSET = 440
RULE = ProbeRule(steps=30, deadline_seconds=600.0)
SITE = Site(folder="/runs/12", trainer=("train",), snapshot_dir="/local", checkpoint_copy="/copy")


def doubtful(step: int, point: Point) -> dict[str, float]:
    """A jump that stays, without what would name its cause for certain."""
    return {"loss": point.loss + 2.0, "gnorm": point.gnorm * 1.6} if step >= ONSET else {}


def probing(policy: Policy = POLICY) -> Policy:
    page = replace(policy.playbooks["loss_spike"], probe=RULE)
    return replace(policy, playbooks={**policy.playbooks, "loss_spike": page})


def training(spares: int = 3, policy: Policy | None = None) -> Story:
    story = Story(policy or probing(), Shape(nodes=2, spares=spares, ranks_per_node=1))
    story.begin()
    story.hold(*(f"n{number + 1}" for number in range(2 + spares)))
    story.train(460)
    for step in (100, 200, 300, 400):
        story.checkpoint(step)
    return story


def trouble(story: Story, restored_from: int | None = 100) -> list[e.Event]:
    digest = onset_digest(
        curve(1, 460, doubtful), ONSET, Place(first_step=1 + (restored_from or 0), restored_from=restored_from)
    )
    return story.signal("loss_spike", 460, ONSET, digest=digest, loss=9.0, median=3.0)


def ended(story: Story, **spiked: bool | None) -> list[e.Event]:
    """Probes of the newest incident end; the decisions that follow the last one."""
    incident = list(story.state.incidents)[-1]
    return story.see(
        *(e.ProbeEnded(incident=incident, probe=ProbeKind(kind), spiked=found, step=469, why="test")
          for kind, found in spiked.items())
    )  # fmt: skip


def test_no_page_that_ships_makes_probes_and_one_line_switches_them_on(tmp_path):
    assert all(page.probe is None for page in POLICY.playbooks.values())
    for path in playbook_loader.folder().glob("*.md"):
        text = path.read_text()
        if path.name == "loss_spike.md":
            text = text.replace("\n[proof]\n", "\n[probe]\n\n[proof]\n", 1)
        (tmp_path / path.name).write_text(text)
    assert playbook_loader.load(tmp_path)[0].playbooks["loss_spike"].probe == ProbeRule(steps=30, deadline_seconds=900)
    for wrong in ("[probe]\nstep = 30", "[probe]\nsteps = 10", "[probe]\nsteps = 51", "[probe]\ndeadline_seconds = 0"):
        (tmp_path / "loss_spike.md").write_text(text_of("loss_spike").replace("[proof]", f"{wrong}\n\n[proof]", 1))
        with pytest.raises(PlaybookError, match="probe"):
            playbook_loader.load(tmp_path)
    (tmp_path / "loss_spike.md").write_text(text_of("loss_spike"))
    (tmp_path / "hang.md").write_text(text_of("hang").replace("[proof]", "[probe]\n\n[proof]", 1))
    with pytest.raises(PlaybookError, match="only a playbook with a rollback"):
        playbook_loader.load(tmp_path)


def text_of(page: str) -> str:
    return (playbook_loader.folder() / f"{page}.md").read_text()


def test_three_idle_nodes_try_other_data_the_same_data_and_a_lower_rate_before_anything_is_decided():
    story = training()
    decided = trouble(story)
    assert kinds(decided) == ["incident_opened", "probes_intended"]
    causes = only(decided, e.IncidentOpened).causes
    assert causes[0].confidence < CERTAIN, causes
    intended = only(decided, e.ProbesIntended)
    assert (intended.checkpoint.step, intended.onset_step, intended.last_step) == (400, 440, 469)
    other, same, lower = intended.probes
    assert [(each.kind, each.node) for each in intended.probes] == [
        (ProbeKind.OTHER_DATA, "n3"),
        (ProbeKind.SAME_DATA, "n4"),
        (ProbeKind.LOWER_LR, "n5"),
    ]
    assert other.skips[0].first == 439
    assert (same.skips, same.lr_factors) == ((), ())
    assert lower.lr_factors == (LrFactor(step=400, factor=0.75),), "the first cut of the page's ladder"
    assert story.state.attempt.live, "training goes on meanwhile"


def test_a_probe_writes_into_a_folder_of_its_own():
    story = training()
    trouble(story)
    orders = orders_of(story.state, SITE)
    assert orders.launch is not None, "the attempt goes on"
    assert [(each.attempt, each.nodes) for each in orders.probes] == [
        ("12-i000-other_data", ("n3",)),
        ("12-i000-same_data", ("n4",)),
        ("12-i000-lower_lr", ("n5",)),
    ]
    for probe in orders.probes:
        said = " ".join(probe.argv)
        folder = f"/runs/12/probes/12-i000/{probe.attempt.removeprefix('12-i000-')}"
        assert f"--run-dir {folder} --checkpoint-dir {folder}/checkpoints --resume " in said
        assert "--attempt 12.00-a0 --fence /runs/12/attempt.json" in said, "a newer attempt ends it"
        assert "/local" not in said
        assert "/copy" not in said
        assert f"--checkpoint-dir {'/runs/12/12.00'}" not in said
    assert len({probe.port for probe in (*orders.probes, orders.launch)}) == 4
    ended(story, other_data=False)
    assert [each.attempt for each in orders_of(story.state, SITE).probes] == ["12-i000-same_data", "12-i000-lower_lr"]


def test_the_data_is_bad_where_only_the_same_data_spikes():
    story = training()
    trouble(story)
    decided = ended(story, same_data=True, other_data=False, lower_lr=True)
    judged, recovery = only(decided, e.ProbesJudged), only(decided, e.RecoveryDecided)
    assert judged.causes[0].cause is Cause.BAD_DATA
    assert (recovery.cause, bool(recovery.skips), recovery.lr_factor) == (Cause.BAD_DATA, True, None)
    assert orders_of(story.state, SITE).probes == ()


def test_the_rate_is_too_high_where_only_a_lower_one_does_not_spike():
    story = training()
    trouble(story)
    recovery = only(ended(story, same_data=True, other_data=True, lower_lr=False), e.RecoveryDecided)
    assert (recovery.rung, recovery.cause, recovery.lr_factor, recovery.skips) == (0, None, 0.75, ())


def test_one_idle_node_tries_other_data():
    story = training(spares=1)
    assert [each.kind for each in only(trouble(story), e.ProbesIntended).probes] == [ProbeKind.OTHER_DATA]
    judged = only(ended(story, other_data=False), e.ProbesJudged)
    assert judged.causes[0].cause is Cause.BAD_DATA


def test_probes_that_show_nothing_change_nothing():
    without, story = training(policy=POLICY), training()
    expected = only(trouble(without), e.RecoveryDecided)
    trouble(story)
    decided = ended(story, same_data=None, other_data=None, lower_lr=None)
    recovery = only(decided, e.RecoveryDecided)
    assert (recovery.rung, recovery.cause, recovery.skips) == (expected.rung, expected.cause, expected.skips)
    assert list(story.state.incidents.values())[-1].causes == list(without.state.incidents.values())[-1].causes


def test_the_decision_comes_at_the_deadline_whatever_the_daemon_did_meanwhile():
    story = training()
    trouble(story)
    story.daemon(blind=1.0)
    assert "recovery_decided" not in [kind for kind in kinds(story.see(seconds=300)) if "probe" in kind]
    ended(story, other_data=False)
    story.daemon(blind=1.0)
    decided = story.see(seconds=400)
    assert kinds(decided)[:2] == ["probes_judged", "recovery_decided"]
    assert only(decided, e.RecoveryDecided).action is Action.ROLLBACK
    assert sum(isinstance(entry.event, e.ProbesIntended) for entry in story.entries) == 1


def test_nothing_is_launched_while_probes_decide_and_the_attempt_has_ended():
    story = training()
    trouble(story)
    assert "attempt_intended" not in kinds(story.ends(Outcome.FAILED, 461))
    assert "attempt_intended" in kinds(ended(story, same_data=True, other_data=False, lower_lr=True))


def test_a_pause_ends_the_wait():
    story = training()
    trouble(story)
    asked = e.PauseRequested(request="r9", author="ann", reason="power", keep_nodes=True)
    assert "probes_judged" in kinds(story.see(asked))


def test_what_a_person_decides_meanwhile_holds():
    story = training()
    trouble(story)
    decided = story.see(e.ChangeRequested(request="r9", author="ann", reason="I know it", to_step=200))
    assert "probes_judged" in kinds(decided)
    acted = [event for event in decided if isinstance(event, e.RecoveryDecided) and not event.advice]
    assert [(each.playbook, each.checkpoint.step) for each in acted] == [("operator", 200)]
    story.ends()
    assert [run.checkpoint.step for run in story.state.runs.values() if run.checkpoint] == [200]


def test_no_probes_without_an_idle_node_a_checkpoint_or_a_doubt():
    assert "probes_intended" not in kinds(trouble(training(spares=0)))
    story = Story(probing(), Shape(nodes=2, spares=1, ranks_per_node=1))
    story.begin()
    story.hold()
    story.train(460)
    assert "probes_intended" not in kinds(trouble(story)), "no checkpoint"
    assert "probes_intended" not in kinds(training().spike(460, ONSET)), "the batches are not known"
    slow = training()
    page = replace(slow.policy.playbooks["loss_spike"], probe=ProbeRule(steps=30, deadline_seconds=0.001))
    slow.policy = replace(slow.policy, playbooks={**slow.policy.playbooks, "loss_spike": page})
    attempt, at = slow.state.attempt.name, slow.now
    slow.see(e.AttemptProgressed(attempt=attempt, first_step=1, first_step_at=at - 900, step=460, at=at))
    assert "probes_intended" not in kinds(trouble(slow)), "they would not end by the deadline"


def test_what_the_telemetry_of_a_probe_shows():
    story = training()
    intended = only(trouble(story), e.ProbesIntended)
    probe = intended.probes[0]
    fine, bad = curve(2, 470), curve(2, 470, doubtful)
    assert verdict(intended, probe, fine[:450]) is None, "not past the onset yet"
    assert verdict(intended, probe, fine).spiked is False
    found = verdict(intended, probe, bad[:445])
    assert (found.spiked, found.probe) == (True, ProbeKind.OTHER_DATA)
    odd = [replace(point, loss=9.0) if point.step == 450 else point for point in fine]
    assert verdict(intended, probe, odd).spiked is False, "one odd point is no spike"
    broken = [*fine[:445], replace(fine[445], loss=None, finite=False)]
    assert verdict(intended, probe, broken).spiked is True
    assert died(intended, probe, fine[:420]).spiked is None
    assert Skip(first=1, last=2) not in probe.skips
