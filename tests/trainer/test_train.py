"""Whole runs of ``python -m trainer``."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import REPOSITORY, SMALL, finish, settings, start, telemetry, train, wait_for, waits
from trainer import optim
from trainer.recipes import OptimConfig

STEPS = 70
EVERY = 15
CONFIG = {"peak_lr": 3e-3, "warmup_steps": 60, "total_steps": 600, "final_fraction": 0.1}

FIELDS = {
    *("ts", "num_updates", "loss", "ppl", "gnorm", "clip", "actv_norm", "lr", "betas", "weight_decay", "clip_norm"),
    *("loss_scale", "finite", "skipped", "skip", "bad_module", "pnorm", "blocks", "checksums", "bsz", "wpb", "wps"),
    *("ups", "step_seconds", "busy_seconds", "save_seconds", "eval_seconds", "log_seconds", "save_error", "valid"),
    *("train_wall", "wall", "tokens", "data_position", "tflops", "mfu", "cuda_gb_allocated"),
    *("attn_logit_max", "stage", "base_lr"),
}
# What the same training gives again to the last bit, whenever and however often it is interrupted.
REPRODUCIBLE = ("num_updates", "loss", "gnorm", "actv_norm", "lr", "tokens", "data_position")


def arguments(folder: Path, text: Path, attempt: str, *extra: str | Path) -> list[str | Path]:
    return [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", folder / attempt),
        *("--checkpoint-dir", folder / "checkpoints"),
        *settings(*SMALL, "optim.peak_lr=3e-3", f"steps={STEPS}", f"checkpoint_every={EVERY}"),
        *extra,
    ]


def reproducible(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in REPRODUCIBLE) for line in lines]


def wait_for_step(run_dir: Path, step: int) -> None:
    path = run_dir / "telemetry.jsonl"
    wait_for(lambda: path.exists() and len(telemetry(run_dir)) >= step, f"{run_dir} did not reach step {step}")


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = train(2, *arguments(folder, text, "a1"))
    assert [process.returncode for process in done] == [0, 0], done
    assert [process.stderr for process in done] == ["", ""]
    return folder


def test_every_update_has_its_line(uninterrupted: Path) -> None:
    lines = telemetry(uninterrupted / "a1")
    assert [line["num_updates"] for line in lines] == list(range(1, STEPS + 1))
    for step, line in enumerate(lines, start=1):
        assert set(line) == FIELDS
        assert line["finite"]
        assert line["save_error"] is None
        assert 0 < line["busy_seconds"]["median"] <= line["busy_seconds"]["max"]
        assert line["data_position"] == step * 8
        assert line["tokens"] == step * 8 * 32
        assert line["ppl"] == pytest.approx(math.exp(line["loss"]))
        assert line["clip"] == (100 if line["gnorm"] > line["clip_norm"] else 0)
        assert line["ups"] == pytest.approx(1 / line["step_seconds"])
        assert (line["bsz"], line["wpb"]) == (8, 256)
        assert line["save_seconds"] == 0 or step % EVERY == 1, "the step after a save is the one that it holds up"
    assert sum(line["save_seconds"] > 0 for line in lines) == STEPS // EVERY
    assert sum(line["step_seconds"] for line in lines) == pytest.approx(lines[-1]["train_wall"])
    assert lines[0]["lr"] == pytest.approx(3e-3 / 60)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5, "it learns nothing"


def test_the_phases_tell_training_from_saving(uninterrupted: Path) -> None:
    phases = [json.loads(line) for line in (uninterrupted / "a1" / "phases.jsonl").read_text().splitlines()]
    saves = [*range(EVERY, STEPS, EVERY), STEPS]
    expected = [("start", None), ("training", 0)]
    expected += [told for step in saves for told in (("saving", step), ("training", step))]
    expected[-1] = ("ending", STEPS)
    assert [(line["phase"], line["step"]) for line in phases] == expected
    lines = telemetry(uninterrupted / "a1")
    updates = {line["num_updates"]: line["ts"] for line in lines}
    held_up = {line["num_updates"] - 1: line["save_seconds"] for line in lines}
    for line, following in pairwise(phases):
        assert set(line) == {"ts", "phase", "step"}
        assert line["ts"] <= following["ts"]
        if line["phase"] == "saving":
            assert updates[line["step"]] <= line["ts"] <= updates.get(line["step"] + 1, math.inf)
            if line["step"] < STEPS:
                assert following["ts"] - line["ts"] >= held_up[line["step"]] - 1e-3


def test_the_configuration_in_force_is_on_record(uninterrupted: Path, text: Path) -> None:
    config = json.loads((uninterrupted / "a1" / "config.json").read_text())
    assert set(config) == {
        *("v", "attempt", "recipe", "host", "ts", "settings", "schedule", "lr_factors", "optimizer", "layout", "model"),
        *("skips", "data", "resume", "init_from", "steps", "versions", "device", "kernels", "capabilities"),
    }
    assert (config["attempt"], config["recipe"], config["resume"]) == ("a1", "opt-tiny", None)
    assert config["steps"] == STEPS
    assert re.fullmatch(r"[0-9a-f]{12}", config["versions"]["code"]), "of the trainer's own sources"
    assert config["settings"]["model"]["hidden_size"] == 32
    assert config["schedule"] == CONFIG
    assert config["layout"] == {"world": 2, "dp": 2, "tp": 1}
    assert config["data"]["sources"] == [str(text)]
    assert config["model"]["parameters"] == 42_944
    assert config["device"] == {"name": "cpu", "attention": "flash", "deterministic": False}


def test_checkpoints_come_when_they_should_and_the_last_step_has_one(uninterrupted: Path) -> None:
    lines = telemetry(uninterrupted / "a1")
    found = manifest.committed(uninterrupted / "checkpoints")
    assert [step for step, _ in found] == [*range(EVERY, STEPS, EVERY), STEPS]
    for step, path in found:
        checked = manifest.verify(path)
        assert (checked.step, checked.attempt) == (step, "a1")
        assert checked.telemetry == lines[step - 1]
        assert (checked.tokens, checked.data_position) == (step * 256, step * 8)


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_the_losses_are_the_same_bits(
    uninterrupted: Path, text: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    victim, step = draw.randrange(2), draw.randrange(EVERY + 5, STEPS - 10)

    ranks = start(2, *arguments(tmp_path, text, "a1"))
    wait_for_step(tmp_path / "a1", step)
    ranks[victim].kill()
    codes = [process.returncode for process in finish(ranks)]
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    before = telemetry(tmp_path / "a1")
    assert step <= len(before) < STEPS

    saved, path = manifest.committed(tmp_path / "checkpoints")[-1]
    done = train(2, *arguments(tmp_path, text, "a2", "--resume", path))
    assert [process.returncode for process in done] == [0, 0], done
    assert f"resumed from {path}, step {saved}" in done[0].stdout
    after = telemetry(tmp_path / "a2")
    whole = reproducible(telemetry(uninterrupted / "a1"))
    assert reproducible(before) == whole[: len(before)]
    assert reproducible(after) == whole[saved:]


def test_torchrun_starts_it(uninterrupted: Path, text: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "trainer", *map(str, arguments(tmp_path, text, "a1", *settings("steps=8")))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert reproducible(telemetry(tmp_path / "a1")) == reproducible(telemetry(uninterrupted / "a1"))[:8]


BEFORE, UPDATES, FACTOR = 120, 30, 100.0


@pytest.fixture(scope="module")
def drilled(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process alone, with a learning rate a hundred times too high in the thirty updates after step 120."""
    folder = tmp_path_factory.mktemp("drilled")
    (folder / "a1").mkdir()
    drill = {"id": "d1", "kind": "lr", "from_step": BEFORE + 1, "updates": UPDATES, "factor": FACTOR}
    (folder / "a1" / "drill.json").write_text(json.dumps([drill]))
    (done,) = train(0, *arguments(folder, text, "a1", *settings("steps=260", "checkpoint_every=40")))
    assert done.returncode == 0, done.stderr
    return folder


def mean_losses(lines: list[dict[str, Any]]) -> list[float]:
    """Of ten updates each, so that one hard batch does not count."""
    losses = [line["loss"] for line in lines]
    return [sum(losses[i : i + 10]) / 10 for i in range(0, len(losses) - 9, 10)]


def test_the_layout_does_not_show_in_the_losses(drilled: Path, uninterrupted: Path) -> None:
    assert telemetry(drilled / "a1")[-1]["busy_seconds"] is None, "one rank waits for nobody"
    one, two = ([line["loss"] for line in telemetry(folder / "a1")][:20] for folder in (drilled, uninterrupted))
    assert one == pytest.approx(two, rel=1e-5)


def test_a_drill_makes_the_loss_diverge_for_good(drilled: Path) -> None:
    lines = telemetry(drilled / "a1")
    schedule = [optim.learning_rate(step, OptimConfig(**CONFIG)) for step in range(1, len(lines) + 1)]
    factors = [line["lr"] / lr for line, lr in zip(lines, schedule, strict=True)]
    expected = [1] * BEFORE + [FACTOR] * UPDATES + [1] * (len(lines) - BEFORE - UPDATES)
    assert factors == pytest.approx(expected)
    healthy = mean_losses(lines[:BEFORE])[-1]
    after = mean_losses(lines[BEFORE:])
    assert max(after) > healthy + 1
    assert min(after[:11]) > healthy + 0.1, "within 110 updates it healed by itself"


def test_from_before_the_drill_with_half_the_learning_rate_it_trains_well(
    drilled: Path, text: Path, tmp_path: Path
) -> None:
    path = manifest.step_folder(drilled / "checkpoints", BEFORE)
    extra = ["--resume", path, "--lr-factor", f"{BEFORE}:0.5", *settings("steps=200")]
    (done,) = train(0, *arguments(tmp_path, text, "a1", *extra))
    assert done.returncode == 0, done.stderr
    assert "note: settings, data, learning-rate factors or skip windows differ" in done.stdout
    lines, before = telemetry(tmp_path / "a1"), telemetry(drilled / "a1")
    schedule = [optim.learning_rate(step, OptimConfig(**CONFIG)) for step in range(BEFORE + 1, 201)]
    assert [line["lr"] for line in lines] == pytest.approx([lr / 2 for lr in schedule])
    after = mean_losses(lines)
    assert max(after) < mean_losses(before[:BEFORE])[-1] + 0.1
    assert after[-1] < mean_losses(before[:200])[-1] - 0.2


def test_a_damaged_checkpoint_ends_with_65(drilled: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000040"
    shutil.copytree(manifest.step_folder(drilled / "checkpoints", 40), path)
    os.truncate(path / "__0_0.distcp", 1000)
    (done,) = train(0, *arguments(tmp_path, text, "a1", "--resume", path))
    assert done.returncode == 65
    assert done.stderr.startswith(f"error: {path}: __0_0.distcp has 1000 bytes, the manifest says ")
    assert done.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_with_82_and_is_not_applied(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a1").mkdir()
    drill = {"id": "d1", "kind": "lr", "from_step": 4, "updates": 1, "factor": 1e30}
    (tmp_path / "a1" / "drill.json").write_text(json.dumps([drill]))
    (done,) = train(0, *arguments(tmp_path, text, "a1", *settings("checkpoint_every=4")))
    assert done.returncode == 82
    assert done.stderr.startswith("error: step 5: loss nan, gradient norm nan")
    last = telemetry(tmp_path / "a1")[-1]
    assert last["bad_module"].startswith("forward of "), "the weights are huge, but finite"
    assert done.stderr.endswith(f"first not finite: {last['bad_module']}\n")
    assert (last["num_updates"], last["finite"], last["loss"], last["gnorm"]) == (5, False, None, None)
    assert last["data_position"] == 4 * 8, "the samples of an update that was not applied are still to come"
    assert [step for step, _ in manifest.committed(tmp_path / "checkpoints")] == [4], "a save in flight was lost"
    phase = json.loads((tmp_path / "a1" / "phases.jsonl").read_text().splitlines()[-1])
    assert (phase["phase"], phase["step"]) == ("ending", 4), "waiting for that save is no hang"


@pytest.mark.parametrize(
    "changes", [(), ("parallel.tp=2",), ("precision=fp16",), ("engine=fairscale", "precision=fp32")]
)
def test_a_nan_drill_ends_all_ranks_with_82(text: Path, tmp_path: Path, changes: tuple[str, ...]) -> None:
    if "engine=fairscale" in changes:
        pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")
    (tmp_path / "a1").mkdir()
    nan, lr = {"id": "d1", "kind": "nan"}, {"id": "d2", "kind": "lr", "updates": 1, "factor": 2.0}
    (tmp_path / "a1" / "drill.json").write_text(json.dumps([drill | {"from_step": 3} for drill in (nan, lr)]))
    done = train(2, *arguments(tmp_path, text, "a1", *settings("checkpoint_every=2", *changes)))
    assert [process.returncode for process in done] == [82, 82], done
    *before, last = telemetry(tmp_path / "a1")
    assert [line["finite"] for line in before] == [True, True]
    assert (last["num_updates"], last["finite"], last["loss"]) == (3, False, None)
    assert last["bad_module"] == "the loss, which a drill made NaN"
    assert last["tokens"] == before[-1]["tokens"], "it was not applied"
    assert [step for step, _ in manifest.committed(tmp_path / "checkpoints")] == [2]


def test_a_drill_that_cannot_be_read_ends_all_ranks_with_78(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / "drill.json").write_text("[{")
    done = train(2, *arguments(tmp_path, text, "a1"))
    assert [process.returncode for process in done] == [78, 78]
    assert "drill.json is not a list of drills" in done[0].stderr
    assert done[1].stderr == "error: rank 0 cannot read drill.json. The log of rank 0 has the reason.\n"


def test_signals_end_a_rank_at_once_even_while_it_waits_for_a_frozen_peer(text: Path, tmp_path: Path) -> None:
    ranks = start(2, *arguments(tmp_path, text, "a1", *settings("steps=100000", "checkpoint_every=100000")))
    wait_for_step(tmp_path / "a1", 3)
    ranks[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: waits(ranks[0]), "rank 0 does not wait for a stopped peer")
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(timeout=240) == 143
    ranks[1].send_signal(signal.SIGINT)
    ranks[1].send_signal(signal.SIGCONT)
    assert ranks[1].wait(timeout=240) == 130
    assert [process.stderr for process in finish(ranks)] == ["stopped by SIGTERM\n", "stopped by SIGINT\n"]


def test_a_run_that_ended_before_its_last_copy_makes_it_when_it_is_resumed(text: Path, tmp_path: Path) -> None:
    few = [*settings("steps=4", "checkpoint_every=100"), "--snapshot-dir", tmp_path / "disk"]
    (done,) = train(0, *arguments(tmp_path, text, "a1", *few))
    assert done.returncode == 0, done.stderr
    last = manifest.step_folder(tmp_path / "checkpoints", 4)
    whole = manifest.verify(last)
    shutil.rmtree(last)
    snapshot = manifest.snapshot_folder(tmp_path / "checkpoints", 4)
    (done,) = train(0, *arguments(tmp_path, text, "a2", *few, "--resume", snapshot))
    assert done.returncode == 0, done.stderr
    again = manifest.verify(last)
    assert {name: file["sha256"] for name, file in again.files.items() if name.endswith(".distcp")} == {
        name: file["sha256"] for name, file in whole.files.items() if name.endswith(".distcp")
    }
    assert telemetry(tmp_path / "a2") == [], "no step was left to take"
