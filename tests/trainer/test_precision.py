"""bf16 and fp16 in the arithmetic itself, on the CPU, and fp16's loss scale from overflow to growth to the floor."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_parallel import build, samples, whole
from trainer import optim, recipes
from trainer.data.samples import Samples
from trainer.recipes import LossScaleConfig
from trainer.step.loss_scale import LossScale, first_scale, restored_scale
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

CONFIG = LossScaleConfig()


def course(overflows: str, config: LossScaleConfig = CONFIG) -> list[LossScale]:
    """The states after each update; ``x`` overflows."""
    state, states = first_scale(config), []
    for update in overflows:
        state = state.after(overflow=update == "x", config=config)
        states.append(state)
    return states


def test_the_numbers_are_metaseqs() -> None:
    assert LossScaleConfig(initial=4.0, window=256, tolerance=0.0, floor=2**-5, patience=10) == CONFIG


def test_the_scale_doubles_after_each_window_without_overflow_and_so_does_the_window() -> None:
    states = course(1100 * ".")
    changes = [i for i in range(1, len(states)) if states[i].scale != states[i - 1].scale]
    assert changes == [255, 511, 1023], "the window counts from the last overflow, not from the last change"
    assert [(states[i].scale, states[i].window) for i in changes] == [(8, 512), (16, 1024), (32, 2048)]


def test_an_overflow_halves_both_and_growth_waits_for_the_window_again() -> None:
    states = course("x" + 200 * ".")
    assert (states[0].scale, states[0].window) == (2, 128)
    grown = next(i for i, state in enumerate(states) if state.scale == 4)
    assert grown == 128


def test_with_a_tolerance_lone_overflows_are_passed_over() -> None:
    config = replace(CONFIG, tolerance=0.25)
    assert course(10 * "." + "x", config)[-1].scale == 4
    assert course(2 * "." + "x", config)[-1].scale == 2, "one in three is above a quarter"


def test_the_floor_holds_and_counts_the_overflows_that_it_cannot_answer() -> None:
    states = course(20 * "x")
    assert min(state.scale for state in states) == CONFIG.floor
    first = next(i for i, state in enumerate(states) if state.at_floor)
    assert [state.at_floor for state in states[first:]] == list(range(1, 21 - first))
    assert course(20 * "x" + ".")[-1].at_floor == 0


@given(st.text("x.", max_size=400), st.text("x.", max_size=50))
def test_restored_from_json_it_goes_on_alike(before: str, after: str) -> None:
    config = replace(CONFIG, window=4)
    state = (course(before, config) or [first_scale(config)])[-1]
    again = restored_scale(json.loads(json.dumps(state.state())))
    for update in after:
        state, again = (each.after(overflow=update == "x", config=config) for each in (state, again))
    assert state == again
    assert state.scale >= config.floor
    assert math.log2(state.scale).is_integer()


def some_steps(precision: str, tp: int, *changes: str) -> dict[str, Any]:
    recipe = build(0, tp, f"precision={precision}", "optim.eps=1e-8", *changes)
    engine, data, progress = engine_of(recipe), samples(recipe), Progress()
    seen: set[torch.dtype] = set()
    engine.model.layers[0].fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = []
    scale = 8.0 if precision == "fp16" else None
    for step in range(1, 4):
        measured = measure(engine, forward_backward(engine, data, recipe, progress, scale), StepInputs())
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        progress = advanced(progress, recipe)
        losses.append(measured.loss)
    masters = {tensor.dtype for tensor in engine.state()["model"].values()}
    moments = {each.dtype for state in engine.state()["optimizer"].values() for each in state.values()}
    return {"losses": losses, "gnorm": measured.gnorm, "seen": seen, "masters": masters | moments}


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def in_fp32(ranks: Ranks, request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """The size of tensor parallelism, and what some steps give with it in fp32."""
    return request.param, ranks(2, some_steps, "fp32", request.param)[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_in_the_activations_and_fp32_in_what_is_kept(
    ranks: Ranks, in_fp32: tuple[int, dict[str, Any]], precision: str, dtype: torch.dtype
) -> None:
    tp, full = in_fp32
    half = ranks(2, some_steps, precision, tp)[0]
    assert full["seen"] == {torch.float32}
    assert half["seen"] == {dtype}
    assert half["masters"] == {torch.float32}
    assert half["losses"] == pytest.approx(full["losses"], rel=2e-2)
    assert half["losses"] != full["losses"]
    assert half["gnorm"] == pytest.approx(full["gnorm"], rel=5e-2), "measured without the loss scale"


# As many tokens as a rank has in a real run: 125M on eight GPUs. Words are as rare as in a text.
REAL = (
    *("model.num_layers=1", "model.hidden_size=16", "model.vocab_size=2048", "model.max_positions=64"),
    *("data.seq_len=64", "data.global_batch=1024", "data.micro_batch=16"),
)


def gradients_of_a_real_batch(precision: str) -> tuple[dict[str, Tensor], float]:
    """What the first update used: its first moments are (1 − β₁) · gradient."""
    recipe = recipes.build("opt-tiny", [*REAL, f"precision={precision}", "optim.clip_norm=1e9"])
    engine = engine_of(recipe)
    words = np.random.RandomState(0).zipf(1.3, 70_000) % (recipe.model.vocab_size - 4) + 4
    data = Samples(words.astype(np.uint16), recipe.data.seq_len, recipe.seed)
    scale = recipe.loss_scale.initial if precision == "fp16" else None
    shares = forward_backward(engine, data, recipe, Progress(), scale)
    measured = measure(engine, shares, StepInputs())
    engine.update(measured.gnorm, 1e-4, measured.divisor)
    state = engine.state()["optimizer"]
    moments = {name: whole(each["exp_avg"]) / (1 - recipe.optim.betas[0]) for name, each in state.items()}
    return moments, measured.gnorm


def test_fp16_keeps_its_gradients_at_the_token_counts_of_a_real_run(ranks: Ranks) -> None:
    """With the mean back-propagated, the gradients at the logits are below the smallest number of fp16."""
    ((full, gnorm),) = ranks(1, gradients_of_a_real_batch, "fp32")
    ((half, half_gnorm),) = ranks(1, gradients_of_a_real_batch, "fp16")
    assert half_gnorm == pytest.approx(gnorm, rel=2e-3)
    flat, flat_half = (torch.cat([each.flatten() for each in found.values()]) for found in (full, half))
    assert flat.norm().item() == pytest.approx(gnorm, rel=1e-5), "the moments are not those of the mean loss"
    assert (flat_half - flat).norm() / flat.norm() < 0.02
    newly_zero = ((flat_half == 0) & (flat != 0)).sum() / (flat != 0).sum()
    assert newly_zero < 0.01
    for name, expected in full.items():
        if not name.endswith("k_proj.bias"):  # its true gradient is zero
            assert (half[name] - expected).norm() / expected.norm() < 0.1, name
            assert half[name].any(), name


def arguments(folder: Path, text: Path, attempt: str, *extra: str | Path) -> list[str | Path]:
    return [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", folder / attempt),
        *("--checkpoint-dir", folder / "checkpoints"),
        *settings(*SMALL, "steps=40", "checkpoint_every=20", "log_every=8", "precision=fp16", "loss_scale.window=8"),
        *extra,
    ]


def test_overflow_halves_the_scale_skips_the_update_and_growth_follows(text: Path, tmp_path: Path) -> None:
    first = ["loss_scale.initial=33554432", "steps=40"]
    done = train(2, *arguments(tmp_path, text, "a1", *settings(*first)))
    assert [process.returncode for process in done] == [0, 0], done
    lines = telemetry(tmp_path / "a1")
    assert lines[0]["skip"] == "overflow"
    assert (lines[0]["gnorm"], lines[0]["finite"], lines[0]["skipped"]) == (None, True, 1)
    assert lines[0]["tokens"] == 0, "trained on nothing"
    assert lines[0]["lr"] > 0
    for before, line in pairwise(lines):
        if before["skip"] == "overflow":
            assert line["loss_scale"] == before["loss_scale"] / 2
        else:
            assert line["loss_scale"] in (before["loss_scale"], 2 * before["loss_scale"])
        assert line["data_position"] == before["data_position"] + 8
        assert line["skipped"] == before["skipped"] + (line["skip"] is not None)
    assert any(b["loss_scale"] > a["loss_scale"] for a, b in pairwise(lines)), "it never grew"
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1, "it learns nothing"

    path = manifest.step_folder(tmp_path / "checkpoints", 20)
    done = train(2, *arguments(tmp_path, text, "a2", "--resume", path, *settings(*first)))
    assert [process.returncode for process in done] == [0, 0], done
    same = ("num_updates", "loss", "gnorm", "loss_scale", "skipped", "skip", "tokens")
    again = [[line[name] for name in same] for line in telemetry(tmp_path / "a2")]
    assert again == [[line[name] for name in same] for line in lines[20:]], "the window was not saved"


def test_stuck_at_the_floor_it_ends_with_86(text: Path, tmp_path: Path) -> None:
    high = settings("loss_scale.initial=1e30", "loss_scale.floor=5e29", "loss_scale.patience=3")
    done = train(2, *arguments(tmp_path, text, "a1", *high))
    assert [process.returncode for process in done] == [86, 86], done
    assert done[0].stderr.startswith("error: loss scale 5e+29 is at its floor, and the gradients of the last 3 updates")
    lines = telemetry(tmp_path / "a1")
    assert [(line["loss_scale"], line["skip"]) for line in lines] == [(1e30, "overflow"), *3 * [(5e29, "overflow")]]
    assert json.loads((tmp_path / "a1" / "phases.jsonl").read_text().splitlines()[-1])["phase"] == "ending"
