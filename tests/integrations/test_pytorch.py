"""A hand-written loop under the contract: one and two real ranks over gloo."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.contract import committed, lr_of, read, verify
from tests.integrations.ranks import Attempts, Ranks, until

SCRIPT = Path(__file__).with_name("loop.py")
SCHEDULE = {"kind": "cosine", "peak_lr": 1e-2, "warmup_steps": 4, "total_steps": 12, "final_fraction": 0.1}


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Attempts]:
    attempts = Attempts(tmp_path, SCRIPT)
    yield attempts
    attempts.end()


def numbers(lines: list[dict]) -> list[tuple]:
    return [(line["num_updates"], line["loss"], line["gnorm"], line["data_position"], line["tokens"]) for line in lines]


@pytest.mark.parametrize("kind", ["--set=micro_batches=2", "--set=sharded=true"])
def test_a_resume_trains_what_the_run_without_it_would(attempts: Attempts, kind: str) -> None:
    whole = attempts.run("a1", kind, world=2)
    assert [line["num_updates"] for line in whole] == list(range(1, 13))
    assert [line["lr"] for line in whole] == [lr_of(SCHEDULE, (), step) for step in range(1, 13)]
    assert whole[0]["betas"] == [0.9, 0.95]
    assert (whole[0]["weight_decay"], whole[0]["clip_norm"], whole[0]["tokens"]) == (0.1, 1.0, 32)
    assert numbers(attempts.run("a2", kind, world=2, resume=6)) == numbers(whole[6:])  # dropout included
    manifest = verify(attempts.checkpoints / "step-00000006")
    marked = sorted(name for name, file in manifest.files.items() if file.get("state"))
    shards = ["__0_0.distcp", "__1_0.distcp"]
    assert marked == (shards if "sharded" in kind else ["model.pt", "optimizer.pt"])
    assert {"random-0000.pt", "random-0001.pt"} <= manifest.files.keys() - set(marked)


def test_learning_rate_factors_skip_windows_and_settings(attempts: Attempts) -> None:
    plain = attempts.run("a1", "--set=dropout=0")
    orders = ["--lr-factor=6:0.5", "--skip-batches=8:9", "--skip-batches=9:10", "--set=dropout=0"]
    changed = attempts.run("a2", *orders, "--set=optim.betas=0.8,0.9", "--set=optim.weight_decay=0.2", resume=6)
    assert [line["lr"] for line in changed] == [line["lr"] / 2 for line in plain[6:]]
    assert [line["data_position"] // 16 for line in changed] == [7, 11, 12, 13, 14, 15]
    assert (changed[0]["betas"], changed[0]["weight_decay"]) == ([0.8, 0.9], 0.2)
    assert changed[0]["loss"] == plain[6]["loss"]
    assert changed[2]["loss"] not in [line["loss"] for line in plain]


def test_another_number_of_ranks(attempts: Attempts) -> None:
    two = attempts.run("a1", "--set=dropout=0", world=2)
    one = attempts.run("a2", "--set=dropout=0", resume=6)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two[6:]], rel=1e-5)
    attempts.run("a3", world=3, resume=6, code=78)
    assert "batch=16 cannot be divided among 3 ranks" in (attempts.folder / "a3" / "rank-0.log").read_text()


def test_signals_and_the_fence_reach_all_ranks(attempts: Attempts) -> None:
    ranks = attempts.start("a1", "--set=steps=1000000", "--set=checkpoint_every=0", world=2)
    until(lambda: attempts.lines("a1"), ranks)
    ranks.signal(0, signal.SIGTERM)
    for rank in (1, 0):
        before = attempts.committed()
        ranks.signal(rank, signal.SIGUSR1)
        until(lambda before=before: len(attempts.committed()) > len(before), ranks)
    saved = attempts.committed()
    until(lambda: attempts.lines("a1")[-1]["num_updates"] > saved[-1], ranks)
    assert [read(attempts.checkpoints / f"step-{step:08d}").data_position for step in saved] == [16 * s for s in saved]
    attempts.fence.write_text(json.dumps({"attempt": "a2"}))
    began = time.monotonic()
    assert ranks.codes() == [83, 83]
    assert time.monotonic() - began < 60  # 10 s on a machine that has nothing else to do
    assert attempts.committed() == saved


def test_a_loss_of_nan_is_not_applied(attempts: Attempts) -> None:
    (attempts.folder / "a1" / "run").mkdir(parents=True)
    (attempts.folder / "a1" / "run" / "drill.json").write_text('[{"id": "x", "kind": "nan", "from_step": 8}]')
    (attempts.folder / "a1").rename(attempts.folder / "kept")
    ranks = attempts.start("a1", "--set=checkpoint_every=2", world=2)
    (attempts.folder / "kept" / "run" / "drill.json").rename(_made(attempts.folder / "a1" / "run") / "drill.json")
    assert ranks.codes() == [82, 82]
    last = attempts.lines("a1")[-1]
    assert (last["loss"], last["finite"]) == (None, False)
    assert last["num_updates"] >= 8
    assert attempts.committed()[-1] < last["num_updates"]
    assert last["data_position"] == 16 * (last["num_updates"] - 1)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_full_disk_on_one_rank_delays_nobody(attempts: Attempts) -> None:
    lines = attempts.run("a1", "--fault=full disk", world=2)
    errors = {line["num_updates"]: line["save_error"] for line in lines if line["save_error"]}
    assert errors == {7: "OSError: another rank could not do its part. Its log has the reason."}
    assert attempts.committed() == [12]
    assert not (attempts.checkpoints / "step-00000006").exists()
    assert "File too large" in (attempts.folder / "a1" / "rank-1.log").read_text()


def test_a_rank_that_dies_in_a_save_leaves_no_marker(attempts: Attempts) -> None:
    codes = attempts.start("a1", "--fault=killed", world=2).codes()
    assert codes == [1, -signal.SIGKILL]
    assert attempts.committed() == []


def test_a_stale_save_is_refused(attempts: Attempts) -> None:
    attempts.run("a1", "--fault=stale", world=2, code=65)
    assert attempts.committed() == [6]
    assert "stale: model.pt" in (attempts.folder / "a1" / "rank-0.log").read_text()


def test_a_damaged_checkpoint_is_refused_by_all_ranks(attempts: Attempts) -> None:
    attempts.run("a1")
    path = attempts.checkpoints / "step-00000006" / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert attempts.run("a2", world=2, resume=6, code=65) == []
    assert attempts.run("a3", resume=12) == []  # the last step: nothing is left to do
    ranks = Ranks(_made(attempts.folder / "a4"), SCRIPT, ["--run-dir=r", f"--checkpoint-dir={attempts.checkpoints}"])
    assert ranks.codes() == [78]
    assert "--from-scratch" in ranks.log()


@pytest.mark.parametrize(
    ("argument", "message", "world"),
    [
        ("--set=wdth=3", "this trainer has no setting wdth", 1),
        ("--set=steps=many", "--set steps=many: expected a whole number, 1 or more.", 1),
        ("--set=dropout=much", "--set dropout=much: expected a number.", 1),
        ("--data=x", "--data is not supported", 1),
        ("--fault=no update", "went on from update 3 without step.update()", 1),
        ("--fault=left", "the loop was left after update 3, before the last one, 12", 1),
        ("--fault=not wrapped", "the gradients differ between ranks", 2),
    ],
)
def test_what_cannot_work_is_refused_with_78(attempts: Attempts, argument: str, message: str, world: int) -> None:
    attempts.run("a1", argument, world=world, code=78)
    assert message in (attempts.folder / "a1" / "rank-0.log").read_text()


def test_without_a_supervisor_it_is_a_plain_loop(tmp_path: Path) -> None:
    assert Ranks(tmp_path, SCRIPT, ["--set=checkpoint_every=4", "--fault="]).codes() == [0]
    found = committed(tmp_path / "checkpoints")
    assert [step for step, _ in found] == [4, 8, 12]
    verify(found[-1][1])
    second = Ranks(tmp_path, SCRIPT, [])
    assert second.codes() == [1]
    assert "checkpoints/ holds step 12 of an earlier run" in second.log()
