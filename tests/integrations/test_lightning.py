"""A script that trains with Lightning, under the contract: one and two real ranks over gloo."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract import lr_of, read
from tests.integrations.ranks import Attempts, until

if importlib.util.find_spec("lightning") is None:  # its scripts import it, in processes of their own
    pytest.skip("needs lightning (opt-ops[lightning])", allow_module_level=True)

SCRIPT = Path(__file__).with_name("lit.py")
SCHEDULE = {"kind": "cosine", "peak_lr": 0.02, "warmup_steps": 4, "total_steps": 12, "final_fraction": 0.1}
CALM = ("--set=dropout=0", "--set=steps=12")


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Attempts]:
    attempts = Attempts(tmp_path, SCRIPT)
    yield attempts
    attempts.end()


def numbers(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("num_updates", "loss", "gnorm", "lr", "data_position", "tokens")
    return [tuple(line[name] for name in names) for line in lines]


def phases(attempts: Attempts, name: str) -> list[tuple[str, int]]:
    lines = (attempts.folder / name / "run" / "phases.jsonl").read_text().splitlines()
    return [(line["phase"], line["step"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(("rate", "world"), [("plateau", 2), ("epoch", 1), ("annealing", 1)])
def test_a_resume_trains_what_the_run_without_it_would(attempts: Attempts, rate: str, world: int) -> None:
    """Dropout, noise of the data, micro-batches; after update 4 the model is evaluated, and then saved."""
    micro = f"--set=accumulate={4 // world}"
    whole = attempts.run("a1", f"--set=rate={rate}", micro, world=world)
    resumed = attempts.run("a2", f"--set=rate={rate}", micro, world=world, resume=4)
    assert [line["num_updates"] for line in whole] == list(range(1, 13))
    assert numbers(resumed) == numbers(whole[4:])
    halved = {"plateau": [0.02] * 8 + [0.01] * 4, "epoch": [0.02] * 4 + [0.01] * 4 + [0.005] * 4}
    halved["annealing"] = [0.01 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert [line["lr"] for line in whole] == pytest.approx(halved[rate])
    assert phases(attempts, "a1")[0][0] == "start"
    around = phases(attempts, "a1")
    at = around.index(("evaluation", 8))
    assert around[at : at + 4] == [("evaluation", 8), ("training", 8), ("saving", 8), ("training", 8)]
    assert (attempts.folder / "a1" / "final.ckpt").is_file()
    manifest = read(attempts.checkpoints / "step-00000004")
    assert {name for name, file in manifest.files.items() if file.get("state")} == {"model.pt", "optimizer.pt"}
    assert {"lightning.pt", *(f"random-{rank:04d}.pt" for rank in range(world))} < manifest.files.keys()


def test_factors_windows_and_settings(attempts: Attempts) -> None:
    plain = attempts.run("a1", *CALM)
    assert [line["lr"] for line in plain] == [lr_of(SCHEDULE, (), step) for step in range(1, 13)]
    assert (plain[0]["betas"], plain[0]["weight_decay"], plain[0]["clip_norm"]) == ([0.9, 0.999], 0.1, 1.0)
    assert (plain[0]["bsz"], plain[0]["tokens"], plain[-1]["data_position"]) == (8, 16, 96)
    orders = ["--lr-factor=4:0.5", "--skip-batches=6:8", "--skip-batches=7:9", "--set=optim.betas=0.8,0.9"]
    changed = attempts.run("a2", "--set=dropout=0", "--set=steps=14", *orders, "--set=optim.weight_decay=0.2", resume=4)
    assert [line["lr"] for line in changed[:8]] == [line["lr"] / 2 for line in plain[4:]]
    assert [line["data_position"] // 8 for line in changed] == [5, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert (changed[0]["betas"], changed[0]["weight_decay"]) == ([0.8, 0.9], 0.2)
    assert changed[0]["loss"] == plain[4]["loss"]
    more = attempts.run("a3", "--set=dropout=0", "--set=steps=15", resume=14)  # a run that was at its end goes on
    assert [line["num_updates"] for line in more] == [15]
    assert attempts.run("a4", "--set=dropout=0", "--set=steps=15", resume=15) == []


def test_a_rate_of_the_script_is_multiplied_and_stays_its_own(attempts: Attempts) -> None:
    lines = attempts.run("a1", *CALM, "--set=rate=annealing", "--lr-factor=4:0.5")
    base = [0.01 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert [line["base_lr"] for line in lines] == pytest.approx(base)
    assert [line["lr"] for line in lines] == pytest.approx(
        [rate * (0.5 if i >= 4 else 1) for i, rate in enumerate(base)]
    )
    sgd = attempts.run("a2", *CALM, "--set=rate=sgd", "--set=save=1")  # its optimizer.pt is always the same: not stale
    assert [line["lr"] for line in sgd] == [0.01] * 12
    tensor = attempts.run("a3", *CALM, "--set=rate=tensor", "--lr-factor=4:0.5")
    assert [line["lr"] for line in tensor] == pytest.approx([0.01] * 4 + [0.005] * 8)


def test_another_number_of_ranks(attempts: Attempts) -> None:
    two = attempts.run("a1", *CALM, world=2)
    one = attempts.run("a2", *CALM, resume=4)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two[4:]], rel=1e-5)
    assert [line["gnorm"] for line in one] == pytest.approx([line["gnorm"] for line in two[4:]], rel=1e-4)
    assert [line["data_position"] for line in one] == [line["data_position"] for line in two[4:]]


def test_signals_under_slurm_save_and_nothing_else_and_the_fence_ends_it(attempts: Attempts) -> None:
    ranks = attempts.start("a1", "--set=dropout=0", "--set=what=slurm", "--set=steps=100000", "--set=save=0")
    scontrol = attempts.folder / "a1" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {attempts.folder}/called\n")
    scontrol.chmod(0o755)
    until(lambda: len(attempts.lines("a1")) > 3, ranks)
    ranks.signal(0, signal.SIGTERM)
    ranks.signal(0, signal.SIGUSR1)
    until(attempts.committed, ranks)
    saved = attempts.committed()[0]
    until(lambda: len(attempts.lines("a1")) > saved + 3, ranks)
    attempts.fence.write_text('{"attempt": "a2"}')
    assert ranks.codes() == [83], ranks.log()
    assert attempts.committed() == [saved]
    assert not (attempts.folder / "called").exists()
    assert not list(attempts.folder.rglob("hpc_ckpt*"))


def test_two_ranks_save_what_was_asked_of_one_at_the_same_update(attempts: Attempts) -> None:
    ranks = attempts.start("a1", "--set=dropout=0", "--set=steps=100000", "--set=save=0", world=2)
    until(lambda: len(attempts.lines("a1")) > 3, ranks)
    ranks.signal(1, signal.SIGUSR1)
    until(attempts.committed, ranks)
    drill = {"id": "d", "kind": "nan", "from_step": 1}
    (attempts.folder / "a1" / "run" / "drill.json").write_text(json.dumps([drill]))
    assert ranks.codes() == [82, 82], ranks.log()
    last = attempts.lines("a1")[-1]
    assert (last["loss"], last["finite"]) == (None, False)


def test_fp16_tells_the_loss_without_the_scale_and_counts_skipped_updates(attempts: Attempts) -> None:
    plain = attempts.run("a1", *CALM)
    half = attempts.run("a2", *CALM, "--set=what=fp16")
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in plain], rel=0.02)
    assert half[-1]["skipped"] == 0
    too_much = attempts.run("a3", *CALM, "--set=what=fp16", f"--set=scale={2.0**40}")
    assert too_much[0]["skipped"] == 1
    assert too_much[0]["gnorm"] is None
    assert [line["lr"] for line in too_much] == [line["lr"] for line in plain]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("slurm, and no agent", "takes its ranks from Slurm"),
        ("manual", "manual optimization"),
        ("two", "multiple optimizers"),
        ("endless", "DataLoader over a data set with __getitem__"),
        ("many", "come from a dict"),
        ("replacement", "RandomSampler with replacement"),
        ("accumulate", "GradientAccumulationScheduler is not supported"),
        ("path", "the supervisor says what to continue from"),
        ("object", "weights_only=False"),
        ("stop", "after update 5 of 24"),
    ],
)
def test_what_cannot_be_done_is_refused(attempts: Attempts, what: str, words: str) -> None:
    ranks = attempts.start("a1", f"--set=what={what}")
    assert ranks.codes() == [78], ranks.log()
    assert words in ranks.log()
    assert not [step for step in attempts.committed() if what != "stop"]
