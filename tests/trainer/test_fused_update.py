"""The op adamw in the trainer: it updates as torch's AdamW does, and hands out the norms of the update."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_monitors import CHANGES, whole_weights
from tests.trainer.test_parallel import build, samples
from trainer import optim
from trainer.kernels import adamw
from trainer.recipes import OptimConfig
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

UPDATES = 6
pytestmark = pytest.mark.skipif(adamw.cannot_run(torch.device("cpu")) is not None, reason="no g++")


def updates(dp: int, tp: int, op_in: range) -> tuple[dict[str, Any], list[float]]:
    """Weights, moments and norms of updates after ``UPDATES`` updates; those of ``op_in`` are done by the op.

    The gradients are replaced by random ones. True ones may jump with the last bit of a weight, because of ReLU.
    """
    recipe = build(dp, tp, *CHANGES, "optim.clip_norm=0.3")
    engine, data, progress = engine_of(recipe), samples(recipe), Progress()
    reference = engine.model.ops
    op = replace(reference, adamw=adamw.fused, ran={**reference.ran, "adamw": "fused"})
    norms = []
    for step in range(1, UPDATES + 1):
        shares = forward_backward(engine, data, recipe, progress)
        for gradient in engine.gradients():
            gradient.normal_(generator=torch.Generator().manual_seed(step))
        measured = measure(engine, shares, StepInputs(), update_norms=step > 1)
        norms += measured.block_unorms.values()
        engine.model.use(op if step in op_in else reference)
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        assert (engine.squares is None) == (step not in op_in)
        progress = advanced(progress, recipe)
    state = engine.state()["optimizer"]
    found = {"model": whole_weights(engine)}
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = {name: moments[key].full_tensor() for name, moments in state.items()}
    assert {moments["step"].item() for moments in state.values()} == {UPDATES}
    return found, norms


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference, relative to the largest number of a tensor."""
    return max(
        ((found[kind][name] - tensor).abs().max() / tensor.abs().max()).item()
        for kind, tensors in expected.items()
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(("dp", "tp"), [pytest.param(1, 1, marks=pytest.mark.soak), (2, 1), (1, 2)])
def test_updates_agree_with_torch_and_tell_their_norms(ranks: Ranks, dp: int, tp: int) -> None:
    expected, norms = ranks(dp * tp, updates, dp, tp, range(0))[0]
    found, told = ranks(dp * tp, updates, dp, tp, range(1, UPDATES + 1))[0]
    assert worst(found, expected) < 1e-5
    assert told == pytest.approx(norms, rel=1e-4)


def test_it_may_be_switched_on_and_off_in_a_run(ranks: Ranks) -> None:
    """The count of updates is that of the optimizer, whoever does them."""
    expected, norms = ranks(1, updates, 1, 1, range(0))[0]
    for part in (range(4, UPDATES + 1), range(1, 4)):
        found, told = ranks(1, updates, 1, 1, part)[0]
        assert worst(found, expected) < 1e-5
        assert told == pytest.approx(norms, rel=1e-4)


def test_an_update_that_the_device_forbids_changes_nothing_and_does_not_count() -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.ones(3))]
    optimizer = optim.build(weights, OptimConfig(peak_lr=1.0, warmup_steps=10, total_steps=110, final_fraction=0.1))
    optim.set_learning_rate(optimizer, 0.01)
    update = optim.FusedUpdate(optimizer, weights, lambda tensor: tensor.detach(), adamw.fused)
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    assert update(torch.tensor(2.0), torch.tensor(False)).gt(0).all()
    before = [(w.detach().clone(), *(t.clone() for t in optimizer.state[w].values())) for w in weights]
    assert update(torch.tensor(2.0), torch.tensor(True)).tolist() == [0, 0]
    after = [(w.detach(), *optimizer.state[w].values()) for w in weights]
    assert all(
        torch.equal(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )
    update(torch.tensor(2.0))
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]
    # Two equal gradients: the corrected first moment is the gradient, if the count is right.
    moment = optimizer.state[weights[1]]["exp_avg"] / (1 - 0.9**2)
    assert moment.tolist() == pytest.approx([1.0] * 3)
    optimizer.state[weights[0]]["step"].fill_(40)  # as a checkpoint that is read
    lr, old = 0.01, weights[1].detach().clone()
    update(torch.tensor(2.0))
    mean, square = (optimizer.state[weights[1]][key] for key in ("exp_avg", "exp_avg_sq"))
    taken = lr * (mean / (1 - 0.9**41)) / ((square / (1 - 0.95**41)).sqrt() + optimizer.param_groups[0]["eps"])
    decay = optimizer.param_groups[0]["weight_decay"]
    assert weights[1].tolist() == pytest.approx((old * (1 - lr * decay) - taken).tolist(), rel=1e-6)


def test_a_run_goes_on_with_and_without_kernels(text: Path, tmp_path: Path) -> None:
    """``python -m trainer`` with kernels=on, and resumes with on and off, agree with a run without kernels."""
    common = settings(*SMALL, "data.global_batch=2", "data.seq_len=8", "model.num_layers=1", "checkpoint_every=1")
    interpreted = {"on": {"TRITON_INTERPRET": "1"}, "off": {}}

    def run(name: str, kernels: str, steps: int, *more: str | Path) -> list[float]:
        run_dir, checkpoints = tmp_path / name, tmp_path / f"{name}-checkpoints"
        (done,) = train(
            0, "--recipe", "opt-tiny", "--run-dir", run_dir, "--checkpoint-dir", checkpoints, "--data", text, *common,
            *settings(f"kernels={kernels}", f"steps={steps}"), *more, **interpreted[kernels],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ran = json.loads((run_dir / "config.json").read_text())["kernels"]["adamw"]
        assert ran == ("fused" if kernels == "on" else "reference: kernels=off")
        return [line["loss"] for line in telemetry(run_dir)]

    expected = run("off", "off", 3)
    assert run("on", "on", 1) == pytest.approx(expected[:1], abs=1e-5)
    for kernels, saved in (("off", "on"), ("on", "off")):
        path = tmp_path / f"{saved}-checkpoints" / "step-00000001"
        assert run(f"resumed-{kernels}", kernels, 3, "--resume", path) == pytest.approx(expected[1:], abs=1e-5)
