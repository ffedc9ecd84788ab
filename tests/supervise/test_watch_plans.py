"""The watch over training, and what was planned: learning rates, changes that are declared, and attempts that begin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from opt_ops.core import events as e
from opt_ops.core.detect.point import Point
from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import Checkpoint, PlannedChange, Schedule, Tier
from opt_ops.ports import TrainerConfig
from opt_ops.supervise.watch_training import TrainingWatch
from tests.core.detect.test_signals import curve
from tests.core.story import OPTIMIZER, POLICY, SCHEDULE, Story


@dataclass
class Told:
    """A trainer whose files hold what a test says."""

    configs: dict[str, TrainerConfig] = field(default_factory=dict)
    lines: dict[str, list[Point]] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)

    def config(self, attempt: str) -> TrainerConfig | None:
        return self.configs.get(attempt)

    def points(self, attempt: str) -> list[Point]:
        begin = self.read.get(attempt, 0)
        self.read[attempt] = len(self.lines.get(attempt, ()))
        return self.lines.get(attempt, [])[begin:]

    def phases(self, attempt: str) -> list[object]:
        return []


CONFIG = TrainerConfig(steps=1000, schedule=SCHEDULE, optimizer=OPTIMIZER, versions={}, layout={})


class Watched:
    """A story whose telemetry the real watch reads; what the watch yields is folded, and decided on."""

    def __init__(self) -> None:
        self.story = Story()
        self.story.begin()
        self.story.hold()
        self.trainer = Told()
        self.healthy = curve(1000, seed=3)
        self.start()

    def start(self) -> None:
        """A daemon process begins to watch."""
        self.trainer.read.clear()
        store = SimpleNamespace(committed=self.committed, examined=lambda: (), pin=lambda _: None)
        clock = SimpleNamespace(now=lambda: self.story.now, monotonic=lambda: self.story.now)
        self.watch = TrainingWatch(POLICY, self.trainer, store, clock)

    def committed(self, run: str) -> list[Checkpoint]:
        known = (each.checkpoint for each in self.story.state.checkpoints.values())
        return [each for each in known if each.run == run]

    def write(self, steps: Iterable[int], lr: float = 1.0, shift: float = 0.0, config: TrainerConfig = CONFIG) -> None:
        """The newest attempt trains these steps on its plan. `lr` multiplies its rate, `shift` is added to the loss."""
        attempt = self.story.state.attempt
        assert attempt is not None
        self.trainer.configs[attempt.name] = config
        factors = self.story.state.runs[attempt.run].lr_factors
        for step in steps:
            point = self.healthy[step - 1]
            rate = lr * expected_lr(config.schedule, factors, step)
            self.trainer.lines.setdefault(attempt.name, []).append(
                replace(point, lr=rate, loss=(point.loss or 0.0) + shift)
            )

    def look(self) -> list[e.Event]:
        """What the watch yields and what is decided on it."""
        found = list(self.watch.observe(self.story.state))
        return [*found, *self.story.see(*found)]

    def signals(self) -> list[tuple[str, str, int | None]]:
        return [(str(s.signal), str(s.tier), s.onset_step) for s in self.story.state.signals.values()]


def test_a_learning_rate_that_leaves_the_plan_is_rolled_back_to_before_it_left():
    training = Watched()
    training.write(range(1, 451))
    training.look()
    for step in (100, 200, 300, 400):
        training.story.checkpoint(step)
    assert training.signals() == []
    training.write(range(451, 460), lr=2.0)
    decided = training.look()
    assert training.signals() == [("unplanned_lr", Tier.ACT, 451)]
    (recovery,) = [event for event in decided if isinstance(event, e.RecoveryDecided)]
    assert (recovery.action, recovery.checkpoint and recovery.checkpoint.step) == ("rollback", 400)
    assert (recovery.lr_factor, recovery.skip_batches) == (None, 0), "the planned rate, and nothing is left out"
    training.start()
    assert [event for event in training.look() if isinstance(event, e.SignalRaised)] == [], "told once"


@pytest.mark.parametrize("known", [True, False])
def test_a_schedule_that_falls_and_rises_again_is_no_evidence_where_it_is_planned(known: bool):
    training = Watched()
    waves = replace(CONFIG, schedule=replace(SCHEDULE, kind="cosine", cycles=2.0))
    training.write(range(1, 401), config=waves)
    if not known:
        training.trainer.configs["12.00-a0"] = replace(CONFIG, schedule=Schedule(kind="waves"))
    training.look()
    tiers = {signal[1] for signal in training.signals() if signal[0] == "unplanned_lr"}
    assert tiers == (set() if known else {Tier.ALERT})
    assert (training.watch._curve.detector._lr_left == 0) is known


def test_a_run_under_other_settings_is_on_plan_before_and_after_a_takeover():
    training = Watched()
    training.write(range(1, 301))
    training.look()
    training.story.checkpoint(300)
    asked = e.ChangeRequested(
        request="r1", author="ann", reason="try", lr=4e-4, settings=("optim.peak_lr=0.0005", "optim.final_fraction=0")
    )
    training.story.see(asked)
    training.story.checkpoint(310)
    training.story.ends(last_step=310)
    assert len(training.story.state.runs) == 2, "the next run is planned"
    schedule = replace(SCHEDULE, peak_lr=5e-4, final_fraction=0.0)
    training.write(range(311, 400), config=replace(CONFIG, schedule=schedule))
    training.look()
    training.start()
    training.look()
    assert training.signals() == []
    training.write([400], lr=0.5, config=replace(CONFIG, schedule=schedule))
    training.look()
    assert training.signals() == [("unplanned_lr", Tier.ACT, 400)]


def test_an_attempt_that_ignores_the_settings_of_its_run_is_off_plan_at_its_first_update():
    training = Watched()
    training.write(range(1, 301))
    training.look()
    training.story.checkpoint(300)
    training.story.see(e.ChangeRequested(request="r1", author="ann", reason="try", settings=("optim.peak_lr=0.0005",)))
    training.story.checkpoint(310)
    training.story.ends(last_step=310)
    training.write([311])
    training.look()
    assert training.signals() == [("unplanned_lr", Tier.ACT, 311)]


def declared(training: Watched, step: int) -> None:
    change = PlannedChange(step=step, what="stage b", by="ann")
    training.story.see(e.ChangesDeclared(request="r1", author="ann", reason="the mix", planned=(change,)))


def died_after_a_save() -> Watched:
    """Saved at step 500; a rank died at step 540."""
    training = trained_to(500)
    training.story.checkpoint(500)
    training.write(range(501, 540))
    training.look()
    training.story.rank_dies(540)
    training.story.ends(last_step=540)
    return training


def test_a_bad_restore_goes_back_to_an_older_checkpoint_and_the_bad_one_is_never_used_again():
    training = died_after_a_save()
    training.write(range(501, 540), shift=1.0)
    decided = training.look()
    assert [signal[0] for signal in training.signals() if signal[1] == "act"][-1] == "bad_restore"
    (recovery,) = [event for event in decided if isinstance(event, e.RecoveryDecided)]
    assert (recovery.action, recovery.checkpoint and recovery.checkpoint.step) == ("rollback", 400)
    assert (recovery.lr_factor, recovery.skip_batches) == (None, 0)


def test_a_good_restore_is_left_alone():
    training = died_after_a_save()
    training.write(range(501, 600))
    assert recoveries(training.look()) == []


def recoveries(events: list[e.Event]) -> list[str]:
    return [str(event.action) for event in events if isinstance(event, e.RecoveryDecided)]


def trained_to(step: int) -> Watched:
    training = Watched()
    training.write(range(1, step + 1))
    training.look()
    for each in range(100, step, 100):
        training.story.checkpoint(each)
    assert training.signals() == []
    return training


def test_a_jump_that_nobody_planned_is_rolled_back():
    training = trained_to(500)
    training.write(range(501, 650), shift=1.5)
    assert recoveries(training.look()) == ["rollback"]


def test_the_same_jump_is_left_alone_if_it_was_declared_before():
    training = trained_to(500)
    declared(training, 501)
    training.write(range(501, 650), shift=1.5)
    assert recoveries(training.look()) == []


def test_the_same_jump_is_left_alone_if_it_is_declared_shortly_after():
    training = trained_to(500)
    training.write(range(501, 504), shift=1.5)
    training.look()
    declared(training, 501)
    for begin in range(504, 650, 20):
        training.write(range(begin, begin + 20), shift=1.5)
        assert recoveries(training.look()) == []


def test_the_same_jump_is_left_alone_if_the_trainer_plans_it_and_a_late_daemon_reads_all_at_once():
    training = Watched()
    config = replace(CONFIG, planned=(PlannedChange(step=501, what="stage b"),))
    training.write(range(1, 501), config=config)
    training.write(range(501, 650), shift=1.5, config=config)
    assert recoveries(training.look()) == []


def test_a_fault_after_a_planned_change_is_found():
    training = trained_to(500)
    declared(training, 501)
    training.write(range(501, 801), shift=1.5)
    assert recoveries(training.look()) == []
    for step in (600, 700, 800):
        training.story.checkpoint(step)
    training.write(range(801, 950), shift=3.5)
    assert recoveries(training.look()) == ["rollback"]


def test_a_loss_that_other_settings_redefine_is_no_bad_restore_also_for_a_daemon_that_takes_over():
    training = trained_to(500)
    training.story.checkpoint(500)
    training.write(range(501, 520))
    training.look()
    asked = e.ChangeRequested(request="r1", author="ann", reason="x", settings=("data.global_batch=64",))
    training.story.see(asked)
    training.story.checkpoint(520)
    training.story.ends(last_step=520)
    training.write(range(521, 540), shift=1.0)
    assert recoveries(training.look()) == []
    training.start()
    training.write(range(540, 700), shift=1.0)
    assert recoveries(training.look()) == []
    assert [s for s in training.signals() if s[1] == "act"] == []


def test_a_daemon_that_takes_over_after_a_planned_change_still_sees_a_bad_restore():
    training = trained_to(400)
    declared(training, 401)
    training.write(range(401, 620), shift=1.0)
    training.look()
    training.story.checkpoint(600)
    training.story.rank_dies(620)
    training.story.ends(last_step=620)
    training.start()
    training.write(range(601, 640), shift=3.0)
    training.look()
    assert [s[0] for s in training.signals() if s[1] == "act"][-1] == "bad_restore"


SIXTEEN = replace(CONFIG, batch=16)


def test_a_batch_that_nobody_asked_for_is_restored():
    watched = Watched()
    sizes(watched, range(1, 300), 16)
    watched.look()
    sizes(watched, range(300, 304), 4)
    watched.look()
    (incident,) = watched.story.state.incidents.values()
    assert incident.kind == "undeclared_change"
    assert incident.onset_step == 300
    assert incident.causes[0].cause == "batch_size"
    assert incident.decision.action == "rollback"
    assert incident.decision.lr_factor is None


def test_a_batch_that_was_planned_is_left_alone():
    watched = Watched()
    sizes(watched, range(1, 300), 16)
    watched.look()
    declared(watched, 300)
    sizes(watched, range(300, 320), 32)
    watched.look()
    assert not watched.story.state.incidents


def sizes(watched: Watched, steps: Iterable[int], batch: int) -> None:
    watched.healthy = [replace(point, batch=batch) for point in watched.healthy]
    watched.write(steps, config=SIXTEEN)
