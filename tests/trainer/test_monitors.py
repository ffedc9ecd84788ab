"""Norms of updates and attention logits: they are what they say, in each layout, and training does not notice them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_parallel import build, samples
from trainer import optim
from trainer.model.attention import SelfAttention
from trainer.step.attention_logits import ROWS
from trainer.step.measured import Progress, StepMeasurements
from trainer.step.norms import block_of
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

CHANGES = ("optim.eps=1e-8", "optim.weight_decay=0.1", "model.init_std=0.1")


def whole_weights(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in engine.state()["model"].items()}


def updates(dp: int, tp: int, *changes: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """By update: its norms by block as measured in the step after it, and as the weights tell."""
    recipe = build(dp, tp, *CHANGES, *changes)
    engine, data, progress = engine_of(recipe), samples(recipe), Progress()
    found, expected = [], []
    scale = 8.0 if recipe.precision == "fp16" else None
    for step in range(1, 4):
        shares = forward_backward(engine, data, recipe, progress, scale)
        measured = measure(engine, shares, StepInputs(), update_norms=step > 1)
        found.append(dict(measured.block_unorms))
        before = whole_weights(engine)
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        squares: dict[str, float] = {}
        for name, after in whole_weights(engine).items():
            taken = (before[name].double() - after.double()).square().sum().item()
            squares[block_of(name)] = squares.get(block_of(name), 0.0) + taken
        expected.append({name: math.sqrt(square) for name, square in squares.items()})
        progress = advanced(progress, recipe)
    return found[1:], expected[:-1]


@pytest.mark.parametrize(
    ("dp", "tp", "change"),
    [
        (1, 1, "precision=fp32"),
        (2, 1, "precision=bf16"),
        (1, 2, "precision=fp16"),
        (2, 1, "parallel.offload=true"),
        (2, 1, "engine=fairscale"),
        (1, 2, "engine=fairscale"),
    ],
)
def test_the_norm_of_an_update_is_what_it_took_from_the_weights(ranks: Ranks, dp: int, tp: int, change: str) -> None:
    if change == "engine=fairscale":
        pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")
    for found, expected in ranks(dp * tp, updates, dp, tp, change):
        assert len(found) == 2
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def logits(*changes: str) -> tuple[list[float], list[float]]:
    """By layer: the largest attention logit of the sample, and as query and key projections tell."""
    recipe = build(1, 1, *CHANGES, "model.num_layers=3", *changes)
    engine, data = engine_of(recipe), samples(recipe)
    for name, parameter in engine.model.named_parameters():
        if name.endswith("k_proj.bias"):
            nn.init.constant_(parameter, 0.3)
    projections: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: SelfAttention, inputs: tuple[Tensor], output: Tensor) -> None:
            for kind in ("q_proj", "k_proj"):  # the weights are whole while the module runs
                linear = getattr(module, kind)
                projection = F.linear(inputs[0][0], linear.weight, linear.bias)
                projections.setdefault(f"{name}.{kind}", projection.detach())

        return hook

    for name, module in engine.model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(keep(name))
    measured = measure(engine, forward_backward(engine, data, recipe, Progress(), sample=True), StepInputs())
    expected = []
    length = recipe.data.seq_len
    for index in range(3):
        heads = [
            projections[f"layers.{index}.self_attn.{kind}_proj"].unflatten(-1, (-1, 8)).transpose(0, 1) for kind in "qk"
        ]
        product = (heads[0] @ heads[1].transpose(1, 2)) / math.sqrt(8)
        seen = product.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        expected.append(seen[:, length // ROWS - 1 :: length // ROWS].max().item())
    return list(measured.attention_logits), expected


@pytest.mark.parametrize("changes", [(), ("model.norm=post",), ("checkpoint_activations=true",)])
def test_an_attention_logit_is_what_query_and_key_make_of_it(ranks: Ranks, changes: tuple[str, ...]) -> None:
    ((found, expected),) = ranks(1, logits, *changes)
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found)) == 3


def weights_after(closely: bool, dp: int, tp: int, *changes: str) -> tuple[list[bytes], StepMeasurements]:
    """The weights of this rank after some updates, with the monitors or without."""
    recipe = build(dp, tp, *CHANGES, "model.dropout=0.1", *changes)
    engine, data, progress = engine_of(recipe), samples(recipe), Progress()
    measured = None
    for step in range(1, 5):
        shares = forward_backward(engine, data, recipe, progress, sample=closely)
        last = closely and step > 1
        measured = measure(engine, shares, StepInputs(), parameter_norms=closely, update_norms=last)
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        progress = advanced(progress, recipe)
    assert measured
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in engine.model.parameters()]
    return [local.detach().numpy().tobytes() for local in locals_], measured


@pytest.mark.parametrize(
    ("dp", "tp", "changes"),
    [(2, 1, ("precision=bf16", "checkpoint_activations=true")), (2, 2, ()), (1, 2, ("engine=fairscale",))],
)
def test_the_monitors_change_no_bit_of_the_weights(ranks: Ranks, dp: int, tp: int, changes: tuple[str, ...]) -> None:
    if "engine=fairscale" in changes:
        pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")
    closely, alone = (ranks(dp * tp, weights_after, wanted, dp, tp, *changes) for wanted in (True, False))
    for (weights, measured), (plain, without) in zip(closely, alone, strict=True):
        assert len(measured.attention_logits) == 2
        assert measured.block_unorms
        assert not without.attention_logits
        assert not without.block_unorms
        assert weights == plain


def test_a_run_tells_both_every_few_updates(text: Path, tmp_path: Path) -> None:
    """A skipped update has no norm, nor has the first one of a process."""
    arguments = [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c"),
        *settings(*SMALL, "steps=8", "log_every=2", "precision=fp16", "loss_scale.initial=33554432"),
    ]
    done = train(2, *arguments)
    assert [process.returncode for process in done] == [0, 0], done
    lines = telemetry(tmp_path / "a1")
    assert [line["attn_logit_max"] is not None for line in lines] == 4 * [False, True]
    assert all(len(line["attn_logit_max"]) == 2 for line in lines[1::2])
    assert lines[0]["skip"] == "overflow"
    applied = [line["skip"] is None for line in lines]
    assert ["unorm" in line["blocks"] for line in lines[1::2]] == applied[0::2]
    for before, line in zip(lines[0::2], lines[1::2], strict=True):
        if "unorm" in line["blocks"]:
            assert line["blocks"]["unorm"].keys() == line["blocks"]["pnorm"].keys()
            assert 0 < line["blocks"]["unorm"]["layers.0"] < 1000 * before["lr"]
