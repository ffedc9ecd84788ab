"""Ten causes of trouble with the loss: each is named first, from telemetry alone, and its cure is chosen.

The telemetry is drawn from seeds. What a restart shows more is in stories: a cure that failed, the same data,
other data.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.causes import suspicions
from opt_ops.core.decide.cures import SURE
from opt_ops.core.decide.trouble import remedy
from opt_ops.core.detect.onset import Place, onset_digest
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.causes import Cause
from opt_ops.core.values import Action, Fault, Optimizer, Skip
from tests.core.curve import curve
from tests.core.story import Story, only

_PLANNED = 1e-3  # the drawn curves' learning rate
_ASKED = Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
Change = Callable[[int, Point], dict[str, Any]]


def planned_lr(step: int) -> float:
    return _PLANNED


def bad_batches(step: int, point: Point) -> dict[str, Any]:
    return {"loss": point.loss + 2.0, "gnorm": point.gnorm * 8} if 440 <= step < 460 else {}


def edge_of_stability(step: int, point: Point) -> dict[str, Any]:
    growing = math.exp(max(0, step - 250) / 100)
    unorms = {name: norm * growing for name, norm in (point.block_unorms or {}).items()} or None
    return {"loss": point.loss + max(0.0, step - 440) * 0.03, "gnorm": point.gnorm * growing, "block_unorms": unorms}


def slow_second_moment(step: int, point: Point) -> dict[str, Any]:
    """Gradients are usual until the update that is too long."""
    found: dict[str, Any] = {"betas": (0.9, 0.9995)}
    if step >= 440:
        found["loss"] = point.loss + min(1.0, (step - 439) * 0.1)
        found["gnorm"] = point.gnorm * min(4.0, 1.0 + (step - 440) * 0.4)
        found["block_unorms"] = {name: norm * 4 for name, norm in (point.block_unorms or {}).items()} or None
    return found


def scale_collapses(step: int, point: Point) -> dict[str, Any]:
    if step < 440:
        return {"loss_scale": 4096.0}
    return {"loss_scale": max(4096.0 / 2 ** (step - 439), 2.0**-5), "skip": "overflow", "gnorm": None}


def corrupt_block(step: int, point: Point) -> dict[str, Any]:
    if step < 440:
        return {}
    pnorms = {**point.block_pnorms, "layers.1": 31.0} if point.block_pnorms else None
    return {"loss": point.loss + 1.2, "gnorm": point.gnorm * 2.5, "block_pnorms": pnorms}


def other_batch(step: int, point: Point) -> dict[str, Any]:
    if step < 440:
        return {}
    return {"batch": 2, "batch_tokens": 128, "gnorm": point.gnorm * 2, "loss": point.loss + (0.4 if step % 2 else -0.2)}


def other_stage(step: int, point: Point) -> dict[str, Any]:
    return {"stage": "code", "loss": point.loss + 0.5} if step >= 440 else {"stage": "web"}


def schedule_bug(step: int, point: Point) -> dict[str, Any]:
    if step < 420:
        return {}
    return {"lr": _PLANNED * 3, "loss": point.loss + max(0.0, step - 440) * 0.03}


def restored_badly(step: int, point: Point) -> dict[str, Any]:
    return {"loss": point.loss + 0.6, "gnorm": point.gnorm * 2} if step > 400 else {}


@dataclass(frozen=True)
class Told:
    """A kind of trouble, as telemetry shows it, and what is chosen for it."""

    signal: str
    change: Change
    remedy: str | None
    action: Action = Action.ROLLBACK
    restored_from: int | None = 100


TOLD: dict[Cause, Told] = {
    Cause.BAD_RESTORE: Told("loss_spike", restored_badly, "older checkpoint", restored_from=400),
    Cause.UNPLANNED_LR: Told("loss_drift", schedule_bug, "rollback"),
    Cause.BAD_DATA: Told("loss_spike", bad_batches, "rollback+skip"),
    Cause.LR_TOO_HIGH: Told("loss_spike", edge_of_stability, "rollback+lr"),
    Cause.BETA2: Told("loss_spike", slow_second_moment, "rollback+settings"),
    Cause.FP16_SCALE: Told("loss_scale_floor", scale_collapses, "rollback+settings"),
    Cause.CORRUPTED_WEIGHTS: Told("loss_spike", corrupt_block, "rollback"),
    Cause.BATCH_SIZE: Told("loss_spike", other_batch, "rollback"),
    Cause.PLANNED_CHANGE: Told("loss_spike", other_stage, None, action=Action.NOTIFY),
}


def digest_of(told: Told, seed: int, last: int = 460) -> dict[str, Any]:
    points = curve(seed, last, told.change)
    onset = 401 if told.change is restored_badly else 440
    due = [point for point in curve(seed, last) if point.step > 400] if told.restored_from == 400 else ()
    asked = replace(_ASKED, betas=points[0].betas)
    first = 1 if told.restored_from is None else told.restored_from + 1
    place = Place(
        first_step=first,
        restored_from=told.restored_from,
        expected_lr=planned_lr,
        optimizer=asked,
        batch=8,
        due=tuple(due),
    )
    return onset_digest(points, onset, place)


def evidence_of(signal: str) -> dict[str, Any]:
    return {
        "loss_drift": {"level": 3.4, "best": 3.1},
        "loss_scale_floor": {"loss_scale": 0.03, "floor": 0.03},
        "loss_spike": {"loss": 9.0, "median": 3.0},
    }[signal]


def told(story: Story, cause: Cause, seed: int = 1) -> list[e.Event]:
    """The trouble is seen; returns what is decided."""
    kind = TOLD[cause]
    digest = digest_of(kind, seed, last=475 if cause is Cause.BAD_DATA else 460)
    return story.signal(kind.signal, 460, digest["step"], digest=digest, **evidence_of(kind.signal))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cause", TOLD)
def test_each_cause_is_named_first_and_its_cure_is_chosen(cause: Cause, seed: int):
    story = Story().training(460)
    if TOLD[cause].restored_from == 400:
        story.rank_dies(460)
        again(story)
    decided = told(story, cause, seed)
    opened, recovery = only(decided, e.IncidentOpened), only(decided, e.RecoveryDecided)
    assert opened.causes[0].cause is cause, opened.causes
    assert opened.causes[0].confidence >= SURE, opened.causes
    assert opened.causes[0].evidence_for, "a cause without evidence is a guess"
    assert sum(each.confidence for each in opened.causes) <= 1.0
    assert (recovery.action, remedy(recovery)) == (TOLD[cause].action, TOLD[cause].remedy)
    assert recovery.cause is (None if cause is Cause.LR_TOO_HIGH else cause)


def test_a_loss_that_has_come_back_is_suspected_to_heal():
    """Nothing is chosen for it: a finding that asks for action says that it does not heal."""

    def healing(step: int, point: Point) -> dict[str, Any]:
        return {"loss": point.loss + 1.0 * (440 <= step < 452)}

    story = Story().training(460)
    digest = onset_digest(curve(1, 470, healing), 440, Place(first_step=1))
    opened = only(story.signal("loss_spike", 470, 440, digest=digest, **evidence_of("loss_spike")), e.IncidentOpened)
    assert Cause.NONE in [each.cause for each in opened.causes]


def test_without_telemetry_the_ladder_of_today_holds():
    story = Story().training(460)
    recovery = only(story.spike(460, onset=410), e.RecoveryDecided)
    assert (recovery.rung, recovery.cause, recovery.lr_factor) == (0, None, 0.75)


def test_only_the_bad_batches_are_skipped_and_the_learning_rate_stays():
    story = Story().training(460)
    decided = told(story, Cause.BAD_DATA)
    recovery, planned = only(decided, e.RecoveryDecided), only(decided, e.RunPlanned)
    assert recovery.checkpoint.step == 400, "the newest one before the onset: nothing is wrong with the state"
    assert planned.skips == (Skip(first=439, last=459),), "batches 440 to 459 were bad; the onset is known to a line"
    assert planned.lr_factors == ()
    assert recovery.skip_batches == 0


def test_a_shard_that_is_not_over_is_skipped_twice_as_far():
    story = Story().training(450)
    digest = digest_of(TOLD[Cause.BAD_DATA], 1, last=450)
    planned = only(story.signal("loss_spike", 450, 440, digest=digest, **evidence_of("loss_spike")), e.RunPlanned)
    assert planned.skips == (Skip(first=439, last=461),)


def again(story: Story, to_step: int = 460) -> None:
    """What was decided is done, and the next attempt trains up to a step."""
    story.ends()
    story.train(to_step)


def test_a_bad_checkpoint_is_refused_for_ever_and_an_older_one_is_taken():
    story = Story().training(450)
    story.rank_dies(450)
    again(story, 403)
    decided = told(story, Cause.BAD_RESTORE)
    recovery, refused = only(decided, e.RecoveryDecided), only(decided, e.CheckpointRefused)
    assert (refused.checkpoint.step, recovery.checkpoint.step) == (400, 300)
    assert recovery.lr_factor is None
    known = story.state.checkpoints[refused.checkpoint.path]
    assert not known.good
    assert "did not continue the loss" in known.why
    again(story, 350)
    story.rank_dies(350)
    assert only(story.ends(), e.AttemptIntended).checkpoint.step == 300


def test_the_planned_learning_rate_is_restored_from_before_it_left_its_schedule():
    story = Story().training(460, checkpoints=(300, 410, 430))
    decided = told(story, Cause.UNPLANNED_LR)
    recovery = only(decided, e.RecoveryDecided)
    assert recovery.checkpoint.step == 410, "430 is before the loss rose, and after the learning rate left its schedule"
    assert only(decided, e.RunPlanned).lr_factors == ()


def test_beta2_is_set_and_what_is_set_already_is_passed_over():
    story = Story().training(460)
    recovery = only(told(story, Cause.BETA2), e.RecoveryDecided)
    # The story's optimizer has the betas of the first rung: asking for them would change nothing.
    assert recovery.settings == ("optim.eps=1e-6",)
    assert recovery.lr_factor is None


def test_betas_that_are_not_those_asked_for_are_set_again():
    story = Story().training(460)
    points = curve(1, 460, slow_second_moment)
    digest = onset_digest(points, 440, Place(first_step=1, expected_lr=planned_lr, optimizer=_ASKED))
    decided = story.signal("loss_spike", 460, 440, digest=digest, **evidence_of("loss_spike"))
    recovery = only(decided, e.RecoveryDecided)
    assert (recovery.cause, recovery.settings) == (Cause.BETA2, ("optim.betas=0.9,0.95",))
    assert only(decided, e.RunPlanned).settings == ("optim.betas=0.9,0.95",)
    story.ends()
    assert only(story.train(410), e.IncidentClosed).proven, "the proof compares with the betas that were set"


# ---- what a restart shows


def test_a_cut_in_vain_on_the_same_data_makes_the_data_suspect_and_is_taken_back():
    """The first spike looks like an instability. After the cut it comes again on the very same batch."""

    def vague(step: int, point: Point) -> dict[str, Any]:
        return {"loss": point.loss + min(1.0, max(0, step - 439) * 0.15)}

    digest = onset_digest(curve(1, 460, vague), 440, Place(first_step=1))
    story = Story().training(460)
    first = only(story.signal("loss_spike", 460, 440, digest=digest, **evidence_of("loss_spike")), e.RecoveryDecided)
    assert (first.cause, first.lr_factor) == (None, 0.75)
    again(story)
    decided = told(story, Cause.BAD_DATA)
    opened, recovery = only(decided, e.IncidentOpened), only(decided, e.RecoveryDecided)
    assert opened.causes[0].cause is Cause.BAD_DATA
    assert "came again on same data" in " ".join(opened.causes[0].evidence_for)
    assert remedy(recovery) == "rollback+skip"
    assert only(decided, e.RunPlanned).lr_factors == (), "the cut cured nothing, so it is taken back"


def test_other_data_after_a_skip_means_the_learning_rate():
    story = Story().training(460)
    told(story, Cause.BAD_DATA)
    again(story, 500)

    def elsewhere(step: int, point: Point) -> dict[str, Any]:
        rise = min(1.5, (step - 479) * 0.1)
        return {"loss": point.loss + rise, "gnorm": point.gnorm * 1.2} if step >= 480 else {}

    digest = onset_digest(curve(2, 500, elsewhere), 480, Place(first_step=401, restored_from=400))
    decided = story.signal("loss_spike", 500, 480, digest=digest, **evidence_of("loss_spike"))
    opened, recovery = only(decided, e.IncidentOpened), only(decided, e.RecoveryDecided)
    assert opened.causes[0].cause is Cause.LR_TOO_HIGH, opened.causes
    assert (recovery.rung, recovery.lr_factor) == (0, 0.75), "the ladder begins at its first cut"


def test_a_cure_that_failed_is_not_chosen_again_and_the_ladder_ends_with_a_person():
    story = Story().training(460)
    remedies: list[str | None] = []
    for _ in range(6):
        decided = told(story, Cause.CORRUPTED_WEIGHTS)
        recovery = only(decided, e.RecoveryDecided)
        remedies.append(remedy(recovery))
        if recovery.action is Action.HALT:
            break
        again(story)
    assert remedies[0] == "rollback"
    assert remedies.count("rollback") == 1, remedies
    assert remedies[-1] is None, remedies
    assert recovery.action is Action.HALT


def test_a_shard_that_goes_on_behind_the_skipped_batches_is_skipped_further():
    story = Story().training(460)
    told(story, Cause.BAD_DATA)
    again(story, 500)

    def behind(step: int, point: Point) -> dict[str, Any]:
        moved = {"data_position": (step + 21) * 8} if step >= 439 else {}  # 439 to 459 are left out
        return moved | ({"loss": point.loss + 2.0, "gnorm": point.gnorm * 8} if 439 <= step < 470 else {})

    digest = onset_digest(curve(3, 500, behind), 439, Place(first_step=401, restored_from=400))
    decided = story.signal("loss_spike", 500, 439, digest=digest, **evidence_of("loss_spike"))
    assert remedy(only(decided, e.RecoveryDecided)) == "rollback+skip"
    assert len(only(decided, e.RunPlanned).skips) == 2


def test_a_drill_is_its_own_cause():
    story = Story().training(405)
    arguments: Mapping[str, Any] = {"factor": 50.0, "from_step": 410, "updates": 5}
    story.see(
        e.DrillRequested(
            request="r9", drill="12-d0", author="ann", fault=Fault.LR, attempt="12.00-a0", arguments=arguments
        )
    )
    story.train(460)
    opened = only(story.spike(460, onset=412), e.IncidentOpened)
    assert [(each.cause, each.confidence) for each in opened.causes] == [(Cause.UNPLANNED_LR, 1.0)]


def test_probes_decide_where_telemetry_leaves_doubt():
    story = Story().training(460)

    def vague(step: int, point: Point) -> dict[str, Any]:
        return {"loss": point.loss + (1.0 if step >= 440 else 0.0)}

    digest = onset_digest(curve(1, 460, vague), 440, Place(first_step=1))
    story.signal("loss_spike", 460, 440, digest=digest, **evidence_of("loss_spike"))
    raised = next(iter(story.state.signals.values()))
    unsure = suspicions(story.state, raised, ())
    assert all(each.confidence < SURE for each in unsure)
    data = suspicions(story.state, raised, (), {"same_data": True, "other_data": False})
    assert (data[0].cause, data[0].confidence > SURE) == (Cause.BAD_DATA, True)
    rate = suspicions(story.state, raised, (), {"same_data": True, "other_data": True, "lower_lr": False})
    assert rate[0].cause is Cause.LR_TOO_HIGH
    heals = suspicions(story.state, raised, (), {"same_data": False})
    assert heals[0].cause is Cause.NONE


@pytest.mark.parametrize(("asked", "action"), [(8, Action.ROLLBACK), (2, Action.NOTIFY), (None, Action.NOTIFY)])
def test_a_batch_that_nobody_asked_for_is_restored_and_one_that_somebody_changed_stays(
    asked: int | None, action: Action
):
    story = Story().training(460)
    place = Place(first_step=101, restored_from=100, expected_lr=planned_lr, batch=asked)
    digest = onset_digest(curve(1, 460, other_batch), 440, place)
    decided = story.signal("undeclared_change", 460, 440, digest=digest)
    recovery = only(decided, e.RecoveryDecided)
    assert (recovery.action, recovery.lr_factor) == (action, None)


def test_old_journals_have_no_causes():
    assert (
        e.RecoveryDecided(incident="i", playbook="p", version=1, rung=0, action=Action.ROLLBACK, why="").takes_back
        == ()
    )
    decision = e.RecoveryDecided(
        incident="i", playbook="p", version=1, rung=0, action=Action.ROLLBACK, why="", lr_factor=0.75, skip_batches=3
    )
    assert remedy(decision) == "rollback+lr+skip"
