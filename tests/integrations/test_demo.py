"""`make demo TRAINER=…`: the drills of the demo on other trainers, under the real daemon and agents.

In every run, Hugging Face's has two drills; e2e/test_contract_trainer.py has a loop of one's own. `make soak` has all
drills, transformers' default schedule, Lightning's trainer, and the loop in plain PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TWO = {"DRILLS": "kill-rank,lr"}
DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"SCHEDULE": "cosine", "DRILLS": "xid,lr"}, id="cosine"),
        pytest.param({"SCHEDULE": "cosine"}, id="cosine-all", marks=pytest.mark.soak),
        pytest.param(TWO, id="linear", marks=pytest.mark.soak),
        pytest.param(TWO | {"TRAINER": "pytorch"}, id="pytorch-two", marks=pytest.mark.soak),
        pytest.param(TWO | {"TRAINER": "lightning"}, id="lightning-two", marks=pytest.mark.soak),
    ],
)
def test_every_drill_is_recovered_with_proof(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        cwd=tmp_path,
        env={**os.environ, "TRAINER": "hf", **environment},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED at step 400" in done.stdout


def test_a_trainer_that_the_demo_does_not_know_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "TRAINER": "other"}
    done = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert "TRAINER=other is not one of hf, lightning, pytorch" in done.stderr
