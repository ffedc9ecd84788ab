"""fairscale's FSDP on a real GPU, beside FSDP2 on the same one: streams, NCCL and half precision are real here."""

import math
from pathlib import Path

import pytest
import torch

from tests.trainer.harness import SMALL, Ranks, settings, telemetry, train
from tests.trainer.test_engine_fairscale_fsdp import hooks_by_step, losses, numbers

pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: none is here"),
]

# On a GPU the engine named fairscale is its FSDP. FSDP2 compiles in half precision, so their rounding differs.
ENGINES = ("fairscale", "fsdp2")


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_norms_and_losses_are_those_of_fsdp2(ranks: Ranks, precision: str, rel: float) -> None:
    ours, theirs = (ranks(1, numbers, engine, 1, 1, precision)[0] for engine in ENGINES)
    for step, other in zip(ours, theirs, strict=True):
        assert all(map(math.isfinite, step))
        assert step == pytest.approx(other, rel=rel, abs=1e-5)


def test_one_checkpoint_serves_both_engines(ranks: Ranks, tmp_path: Path) -> None:
    (whole,) = ranks(1, losses, "fairscale", 1, 1, tmp_path, save=True)
    for engine in ENGINES:
        (rest,) = ranks(1, losses, engine, 1, 1, tmp_path, load=True)
        assert rest == pytest.approx(whole[-len(rest) :], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: each rank has one of its own")
def test_two_ranks_have_the_losses_of_one(ranks: Ranks, tmp_path: Path) -> None:
    (one,) = ranks(1, losses, "fairscale", 1, 1, tmp_path)
    for dp, tp in ((2, 1), (1, 2)):
        for rank in ranks(2, losses, "fairscale", dp, tp, tmp_path):
            assert rank == pytest.approx(one, rel=1e-4)


def test_a_later_step_runs_no_more_hooks_than_the_first(ranks: Ranks) -> None:
    first, *others = ranks(1, hooks_by_step, "bf16", "fairscale")[0]
    assert others == [first] * 3


def test_whole_runs_use_it(text: Path, tmp_path: Path) -> None:
    arguments = [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c"),
        *settings(*SMALL, "steps=12", "checkpoint_every=6", "engine=fairscale", "precision=bf16"),
    ]
    (done,) = train(0, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert telemetry(tmp_path / "a1")[-1]["num_updates"] == 12
