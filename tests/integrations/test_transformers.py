"""Hugging Face's Trainer under supervision: each trap of its loop, with the real Trainer, on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ops.contract import CheckpointError, NotFiniteError, SupersededError, UserError, batch_of, parse, read
from opt_ops.contract.manifest import pin
from tests.integrations.hf_runs import Data, FakeSignals, Model, Room, Run, hf

SCRATCH = ("--from-scratch", "--set", "checkpoint_every=8")


def drill(run: Run, **fields: Any) -> None:
    (run.folder / "drill.json").write_text(json.dumps([{"id": "d", **fields}]))


def test_a_resume_is_bitwise_equal_across_epochs_windows_and_accumulation(room: Room) -> None:
    windows = ("--skip-batches", "3:4", "--skip-batches", "4:6", "--skip-batches", "14:14")
    usual = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5}  # 6 updates an epoch, 4 samples left
    whole = room.train("whole", *SCRATCH, *windows, **usual)
    resumed = room.train("again", "--resume", str(room.step(8)), *windows, **usual)
    assert list(resumed.lines) == list(range(9, 21))
    assert resumed.compared() == whole.compared(9)
    positions = [line["data_position"] for line in whole.lines.values()]
    assert positions == [10 * batch_of(step, [(3, 4), (4, 6), (14, 14)]) for step in range(1, 21)]
    assert whole.lines[20]["bsz"] == 10


def test_the_samples_of_each_update_are_those_of_the_order_without_the_windows(room: Room) -> None:
    def read_in(name: str, *options: str) -> list[list[int]]:
        data = Data(40)
        room.train(name, *options, steps=12, trainer=room.trainer(data))
        return [data.read[at : at + 4] for at in range(1, len(data.read), 4)]  # the first sample is looked at once

    plain = read_in("plain", *SCRATCH)
    left_out = read_in("windows", *SCRATCH, "--skip-batches", "2:3", "--skip-batches", "3:5")
    assert sorted(index for batch in plain[:10] for index in batch) == list(range(40))  # an epoch has every sample once
    assert plain[:10] != plain[10:]
    assert left_out[:8] == [plain[batch_of(step, [(2, 5)]) - 1] for step in range(1, 9)]
    assert read_in("resumed", "--resume", str(room.step(8)), "--skip-batches", "2:5")[:4] == left_out[8:12]


def test_nan_is_seen_and_leaves_before_the_update(room: Room) -> None:
    weights: dict[int, torch.Tensor] = {}

    def each(run: Run, step: int) -> None:
        weights[step] = torch.cat([each.detach().flatten() for each in run.trainer.model.parameters()]).clone()
        if step == 1:
            drill(run, kind="nan", from_step=10)

    trainer = room.trainer(logging_nan_inf_filter=True)
    with room.leaves(NotFiniteError):
        room.train("nan", *SCRATCH, trainer=trainer, each_step=each)
    run = Run(room.folder / "nan", trainer, None)
    assert list(run.lines) == list(range(1, 11))
    assert (run.lines[10]["loss"], run.lines[10]["finite"]) == (None, False)
    assert run.lines[9]["finite"] is True
    now = torch.cat([each.detach().flatten() for each in trainer.model.parameters()])
    assert torch.equal(now, weights[10])
    assert room.steps() == [8]


def test_rates_of_a_checkpoint_and_of_the_scheduler_do_not_come_back(room: Room) -> None:
    room.train("before", *SCRATCH)
    factor = ("--lr-factor", "8:0.5", "--set", "optim.betas=0.8,0.9", "--set", "optim.weight_decay=0.3")
    resumed = room.train("after", "--resume", str(room.step(8)), *factor)
    theirs = [0.01 * (20 - (step - 1)) / 16 for step in range(9, 21)]
    assert [used["lr"] for used in resumed.used] == [[pytest.approx(0.5 * lr, rel=1e-12)] * 2 for lr in theirs]
    assert all(used["betas"] == [(0.8, 0.9)] * 2 for used in resumed.used)
    assert all(used["weight_decay"] == [0.3, 0.0] for used in resumed.used)  # no decay of biases, as before
    assert [line["lr"] for line in resumed.lines.values()] == [used["lr"][0] for used in resumed.used]
    assert (resumed.lines[9]["betas"], resumed.lines[9]["weight_decay"]) == ([0.8, 0.9], 0.3)


def test_a_lower_rate_after_a_resume_trains_as_from_scratch_with_it(room: Room) -> None:
    room.train("before", *SCRATCH)
    resumed = room.train("after", "--resume", str(room.step(8)), "--lr-factor", "8:0.5")
    scratch = Room(room.folder / "other", room._monkeypatch).train("s", *SCRATCH, "--lr-factor", "8:0.5")
    assert resumed.compared() == scratch.compared(9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "constant_with_warmup"])
def test_telemetry_config_and_transformers_agree_on_the_rate(room: Room, kind: str) -> None:
    run = room.train("run", *SCRATCH, steps=10, lr_scheduler_type=kind)
    logged = [entry["learning_rate"] for entry in run.trainer.state.log_history if "loss" in entry]
    told = [line["lr"] for line in run.lines.values()]
    assert told == pytest.approx(logged, rel=1e-12, abs=0)
    assert told[0] == 0.0  # update 1 has the rate of 0 steps
    assert told[1] == pytest.approx(0.0025)
    assert run.config["schedule"]["delay"] == 1


def test_a_drill_changes_the_rate_in_the_optimizer(room: Room) -> None:
    run = room.train(
        "run",
        *SCRATCH,
        each_step=lambda run, step: step == 5 and drill(run, kind="lr", from_step=7, updates=2, factor=50),
    )
    planned = [0.01 * (20 - (step - 1)) / 16 for step in (6, 7, 8, 9)]
    assert [run.used[step - 1]["lr"][0] for step in (6, 7, 8, 9)] == pytest.approx(
        [planned[0], 50 * planned[1], 50 * planned[2], planned[3]]
    )


def test_a_requested_save_is_of_the_update_in_which_it_was_agreed(room: Room) -> None:
    run = room.train("run", *SCRATCH, each_step=lambda run, step: step == 5 and run.signals.save_requested.set())
    assert room.steps() == [5, 8, 16, 20]
    assert not run.signals.save_requested.is_set()
    again = room.train("again", "--resume", str(room.step(5)))
    assert again.compared() == run.compared(6)


def test_the_fence_ends_the_attempt_and_nothing_is_saved(room: Room) -> None:
    fence = room.folder / "fence"
    fence.write_text('{"attempt": "run"}')

    def each(run: Run, step: int) -> None:
        if step == 10:
            fence.write_text('{"attempt": "another"}')

    with room.leaves(SupersededError):
        room.train("run", *SCRATCH, "--attempt", "run", "--fence", str(fence), steps=2_000, each_step=each)
    assert room.steps()[0] == 8
    assert all((room.step(step) / "COMMITTED").stat().st_mtime < fence.stat().st_mtime + 2 for step in room.steps())


def test_checkpoints_are_pruned_by_our_rule_and_pins_are_kept(room: Room) -> None:
    def each(run: Run, step: int) -> None:
        if step == 5:
            pin(room.step(4))

    run = room.train("run", "--from-scratch", "--set", "checkpoint_every=4", each_step=each, save_total_limit=2)
    assert room.steps() == [4, 16, 20]
    assert run.trainer.args.save_total_limit is None


def test_a_checkpoint_names_every_file_and_marks_those_that_training_changes(room: Room) -> None:
    room.train("run", *SCRATCH)
    manifest = read(room.step(8))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        manifest.files
    )
    assert {name for name, file in manifest.files.items() if file.get("state")} == {"model.safetensors", "optimizer.pt"}
    with (room.step(8) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with room.leaves(CheckpointError):
        room.train("again", "--resume", str(room.step(8)))


def test_a_resume_of_the_last_step_trains_nothing_and_has_its_weights(room: Room) -> None:
    for steps in (20, 16):  # in the middle of an epoch, and at its end
        here = Room(room.folder / str(steps), room._monkeypatch)
        here.folder.mkdir()
        first = here.train("first", *SCRATCH, steps=steps)
        again = here.train("again", "--resume", str(here.step(steps)), steps=steps)
        assert (again.folder / "telemetry.jsonl").read_text() == ""
        pairs = zip(first.trainer.model.parameters(), again.trainer.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_scheduler_of_the_script_is_an_unknown_kind_with_its_own_rate(room: Room) -> None:
    def trainer() -> Any:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)  # computes a rate from the last one
        return hf.Trainer(model=model, args=room.arguments(), train_dataset=Data(), optimizers=(optimizer, scheduler))

    whole = room.train("whole", *SCRATCH, "--lr-factor", "8:0.5", trainer=trainer())
    assert whole.config["schedule"] == {"kind": "other", "name": "ExponentialLR"}
    for step, line in whole.lines.items():
        assert line["base_lr"] == pytest.approx(0.1 * 0.9 ** (step - 1))
        assert line["lr"] == pytest.approx(line["base_lr"] * (0.5 if step > 8 else 1.0), rel=1e-12)
    again = room.train("again", "--resume", str(room.step(8)), "--lr-factor", "8:0.5", trainer=trainer())
    assert again.compared() == whole.compared(9)
    assert whole.lines[20]["betas"] == []
    with room.leaves(UserError, "makes its own scheduler"):
        room.train("set", "--resume", str(room.step(8)), "--set", "optim.peak_lr=1", trainer=trainer())


class Scaler:
    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def test_an_update_that_fp16_skips_moves_the_step_and_not_the_rate_of_the_next(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU there is no gradient scaler: here is one that skips update 6."""
    from accelerate.optimizer import AcceleratedOptimizer

    step, counted = AcceleratedOptimizer.step, []

    def sometimes(self: Any, closure: Any = None) -> None:
        counted.append(1)
        self._is_overflow = len(counted) == 6
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", sometimes)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._is_overflow))

    def each(run: Run, step: int) -> None:
        run.trainer.accelerator.scaler = Scaler()

    trainer = room.trainer()
    clip = trainer.accelerator.clip_grad_norm_
    monkeypatch.setattr(
        trainer.accelerator,
        "clip_grad_norm_",
        lambda *given, **named: torch.tensor(float("inf")) if len(counted) == 5 else clip(*given, **named),
    )
    monkeypatch.setattr(trainer, "_save_scaler", lambda folder: None)
    run = room.train("run", *SCRATCH, trainer=trainer, each_step=each)
    assert [run.lines[step]["skipped"] for step in (5, 6, 7, 20)] == [0, 1, 1, 1]
    assert (run.lines[6]["gnorm"], run.lines[6]["finite"]) == (None, True)
    assert [run.lines[step]["lr"] for step in (6, 7, 8)] == pytest.approx(
        [0.01 * (21 - step) / 16 for step in (6, 7, 8)]
    )
    assert read(room.step(8)).telemetry["skipped"] == 1
    assert run.trainer.lr_scheduler.last_epoch == 19  # the scheduler itself lags


def test_evaluation_is_a_phase_and_changes_no_update(room: Room) -> None:
    plain = room.train("plain", *SCRATCH)
    trainer = room.trainer(eval_strategy="steps", eval_steps=7)
    other = Room(room.folder / "o", room._monkeypatch)
    other.folder.mkdir()
    run = other.train("run", *SCRATCH, trainer=trainer)
    phases = [json.loads(line) for line in (run.folder / "phases.jsonl").read_text().splitlines()]
    named = [(phase["phase"], phase["step"]) for phase in phases]
    assert ("evaluation", 7) in named
    assert named[named.index(("evaluation", 7)) + 1] == ("training", 7)
    assert [line["data_position"] for line in run.lines.values()] == [
        line["data_position"] for line in plain.lines.values()
    ]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        (("--set", "no.such=1"), {}, "no setting no.such"),
        (("--set", "learning_rate=fast"), {}, "learning_rate=fast"),
        (("--set", "lr_scheduler_type=wavy"), {}, "lr_scheduler_type=wavy"),
        (("--set", "seed=4"), {}, "already built"),
        (("--set", "optim.final_fraction=0.1"), {"lr_scheduler_type": "constant"}, "has no final_fraction"),
        (("--data", "corpus"), {}, "--data is not supported"),
        ((), {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5}, "load_best_model_at_end"),
        ((), {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ((), {"save_only_model": True}, "save_only_model"),
        ((), {"per_device_train_batch_size": 65}, "has 64 samples"),
    ],
)
def test_what_cannot_be_done_is_refused(
    room: Room, options: tuple[str, ...], arguments: dict[str, Any], words: str
) -> None:
    with room.leaves(UserError, words):
        room.train("run", *SCRATCH, *options, **{"save_steps": 10, **arguments})
    assert (
        not list((room.folder / "run").glob("telemetry.jsonl"))
        or not (room.folder / "run" / "telemetry.jsonl").read_text()
    )


def test_an_iterable_data_set_is_refused(room: Room) -> None:
    trainer = room.trainer()
    trainer.train_dataset = Endless()
    with room.leaves(UserError, "IterableDataset"):
        room.train("run", *SCRATCH, trainer=trainer)


def test_an_early_end_is_refused(room: Room) -> None:
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 7

    trainer = room.trainer()
    trainer.add_callback(Stop)
    with room.leaves(UserError, "after update 7 of 20"):
        room.train("run", *SCRATCH, trainer=trainer)


def test_settings_by_the_words_of_the_contract_and_by_name_are_set_and_told(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "optim.peak_lr": "0.02",
        "optim.warmup_steps": "2",
        "optim.betas": "0.7,0.8",
        "optim.weight_decay": "0.2",
        "optim.clip_norm": "0.5",
        "optim.total_steps": "30",
        "optim.final_fraction": "0.1",
        "per_device_train_batch_size": "8",
        "lr_scheduler_type": "cosine",
    }
    run = room.train("run", *SCRATCH, *(f"--set={key}={value}" for key, value in words.items()))
    assert run.config["schedule"] == {
        "kind": "cosine",
        "peak_lr": 0.02,
        "warmup_steps": 2,
        "total_steps": 30,
        "final_fraction": 0.1,
        "delay": 1,
        "cycles": 0.5,
    }
    assert run.config["optimizer"] == {"betas": [0.7, 0.8], "weight_decay": 0.2, "clip_norm": 0.5}
    assert run.lines[20]["data_position"] == 160
    told = capsys.readouterr().out
    for setting in (
        "logging_steps=1 (was 500)",
        "logging_nan_inf_filter=False (was True)",
        "opt-ops: --set checkpoint_every: save_steps=8",
    ):
        assert setting in told


def test_a_setting_that_the_script_reads_itself_is_known(room: Room) -> None:
    options = parse(room.options("run", *SCRATCH, "--set", "model.width=16"))
    assert options.settings["model.width"] == "16"
    callback = hf.OptOpsCallback(options)
    room._monkeypatch.setattr(hf, "_signals", None)
    room._monkeypatch.setattr(hf, "Signals", FakeSignals)
    callback.attach(room.trainer(), change=True)


def test_the_callback_alone_refuses_what_breaks_a_promise_and_trains_otherwise(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_signals", FakeSignals())
    options = parse(room.options("alone", *SCRATCH))

    def build(**arguments: Any) -> Any:
        callbacks = [hf.OptOpsCallback(options)]
        return hf.Trainer(Model(), room.arguments(**arguments), train_dataset=Data(), callbacks=callbacks)

    with room.leaves(UserError, "logging_nan_inf_filter=True breaks a promise"):
        build()
    with room.leaves(UserError, "save_total_limit=3 breaks a promise"):
        build(logging_nan_inf_filter=False, save_total_limit=3)
    build(logging_nan_inf_filter=False).train()
    assert room.steps() == [8, 16, 20]
    late = room.trainer(logging_nan_inf_filter=False)
    late.add_callback(hf.OptOpsCallback(options))
    with pytest.raises(UserError, match="after the Trainer was built"):
        late.train()


def test_without_a_run_dir_nothing_changes(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_options", parse(["--set", "steps=3"]))
    trainer = room.trainer(max_steps=2, save_strategy="no")
    before = dict(vars(trainer)), dict(vars(trainer.args)), list(trainer.callback_handler.callbacks)
    hf.supervise(trainer)
    assert (dict(vars(trainer)), dict(vars(trainer.args)), list(trainer.callback_handler.callbacks)) == before
    trainer.train()
    assert trainer.state.global_step == 2
    assert not list(Path(room.folder).glob("*/telemetry.jsonl"))
