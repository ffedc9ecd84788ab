"""Hugging Face's Trainer on two ranks, in processes of their own: what one rank cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.contract import committed, read
from tests.integrations.ranks import Attempts

SCRIPT = Path(__file__).with_name("hf_script.py")
WINDOWS = ("--skip-batches=3:4", "--samples=40")


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path, SCRIPT)


def test_two_ranks_save_the_state_of_each_and_resume_bitwise(attempts: Attempts) -> None:
    whole = attempts.run("a0", "--set=checkpoint_every=4", *WINDOWS, world=2)
    assert [step for step, _ in committed(attempts.checkpoints)] == [4, 8, 12]
    step = committed(attempts.checkpoints)[0][1]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= set(read(step).files)
    resumed = attempts.run("a1", *WINDOWS, world=2, resume=4)
    fields = ("num_updates", "loss", "gnorm", "lr", "data_position")
    assert [[line[name] for name in fields] for line in resumed] == [
        [line[name] for name in fields] for line in whole[4:]
    ]
    assert whole[0]["bsz"] == 8
    assert [line["data_position"] for line in whole[:4]] == [8, 16, 40, 48]


def test_on_another_number_of_ranks_an_update_keeps_its_samples(attempts: Attempts) -> None:
    attempts.run("a0", "--set=checkpoint_every=4", world=2)
    one = attempts.run("a1", resume=4)
    assert [line["bsz"] for line in one] == [8] * 8
    assert [line["data_position"] for line in one] == [8 * step for step in range(5, 13)]
    assert "gradient_accumulation_steps=2" in (attempts.folder / "a1" / "rank-0.log").read_text()
