"""A run through interpreted kernels has the losses of PyTorch's path, and either goes on from the other.

A program costs about 10 ms in the interpreter, so a step has two tokens. `make soak` trains KERNEL_STEPS=200 steps.
"""

import os
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import settings, telemetry, train

pytest.importorskip("triton", reason="needs triton")

STEPS = int(os.environ.get("KERNEL_STEPS", "8"))
SAVED, MORE = STEPS // 2, STEPS // 4
TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.vocab_size=500",  # 12 columns of padding
    "model.max_positions=2",
    "data.seq_len=2",
    "data.global_batch=1",
    "data.micro_batch=1",
    "optim.eps=1e-4",  # AdamW divides by the root of a square near zero: an eps that is not tiny keeps rounding small
    f"checkpoint_every={SAVED}",
)


def losses(folder: Path, kernels: str, *more: str | Path, steps: int = STEPS) -> list[float]:
    recipe = settings(*TINY, f"steps={steps}", f"kernels={kernels}")
    places = ("--run-dir", folder / kernels, "--checkpoint-dir", folder / f"checkpoints-{kernels}")
    (done,) = train(1, "--recipe", "opt-tiny", *recipe, *places, *more, TRITON_INTERPRET="1")
    assert done.returncode == 0, done
    return [line["loss"] for line in telemetry(folder / kernels)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, {kernels: losses(folder, kernels) for kernels in ("off", "on")}


@pytest.mark.slow
def test_many_steps_have_the_losses_of_the_reference(runs: tuple[Path, dict[str, list[float]]]) -> None:
    _, found = runs
    assert len(found["on"]) == STEPS
    assert found["on"] == pytest.approx(found["off"], abs=1e-5)
    assert found["on"] != found["off"], "the same bits: did the kernels run?"


@pytest.mark.parametrize(("saved", "resumed"), [("on", "off"), ("off", "on")])
def test_a_run_goes_on_with_the_other_choice(
    runs: tuple[Path, dict[str, list[float]]], tmp_path: Path, saved: str, resumed: str
) -> None:
    folder, found = runs
    checkpoint = manifest.step_folder(folder / f"checkpoints-{saved}", SAVED)
    on = losses(tmp_path, resumed, "--resume", checkpoint, steps=SAVED + MORE)
    assert on == pytest.approx(found["off"][SAVED : SAVED + MORE], abs=1e-5)
