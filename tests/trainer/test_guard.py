"""Which updates are skipped, and where numbers cease to be finite."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, Ranks, engine_of, telemetry, train
from tests.trainer.harness import settings as set_
from tests.trainer.test_parallel import build, samples
from trainer import recipes
from trainer.step.guard import Guard, first_bad_module
from trainer.step.measured import Progress, StepMeasurements
from trainer.step.step import forward_backward

RECIPE = recipes.build("opt-tiny")


def measured(loss: float, gnorm: float, loss_scale: float | None = None) -> StepMeasurements:
    return StepMeasurements(loss=loss, activation_norm=1.0, gnorm=gnorm, loss_scale=loss_scale)


def warm(updates: int = 128, *changes: str) -> Guard:
    guard, draw = Guard(recipes.build("opt-tiny", changes)), random.Random(1)
    for _ in range(updates):
        assert guard.skip_reason(measured(2.0 + draw.gauss(0, 0.05), 0.3 + draw.gauss(0, 0.02))) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "gnorm", "reason"), [(2.0, 0.3, None), (5.0, 0.3, None), (2.0, 3.0, None), (5.0, 3.0, "out_of_band")]
)
def test_only_what_is_out_of_both_bands_is_skipped(loss: float, gnorm: float, reason: str | None) -> None:
    guard = warm()
    assert guard.skip_reason(measured(loss, gnorm)) == reason
    assert guard.skipped == (reason is not None)


def test_never_two_in_a_row_and_what_was_skipped_does_not_widen_the_band() -> None:
    guard = warm()
    reasons = [guard.skip_reason(measured(5.0 + i, 3.0 + i)) for i in range(2)]
    assert reasons == ["out_of_band", None]
    guard = warm()
    again = [guard.skip_reason(measured(*values)) for values in ((9.0, 9.0), (2.0, 0.3), (5.0, 3.0))]
    assert again == ["out_of_band", None, "out_of_band"]


def test_an_overflow_before_it_does_not_let_a_bad_batch_through() -> None:
    guard = warm(128, "precision=fp16")
    assert guard.skip_reason(measured(2.0, math.inf, 4.0)) == "overflow"
    assert guard.skip_reason(measured(5.0, 3.0, 2.0)) == "out_of_band"


def test_it_looks_on_until_it_has_seen_enough_and_can_be_turned_off() -> None:
    assert warm(63).skip_reason(measured(5.0, 3.0)) is None
    assert warm(64).skip_reason(measured(5.0, 3.0)) == "out_of_band"
    assert warm(128, "guard.deviations=0").skip_reason(measured(5.0, 3.0)) is None


def test_a_healthy_curve_with_one_bad_batch_loses_that_batch_alone() -> None:
    guard, draw, skipped = Guard(RECIPE), random.Random(2), []
    for step in range(1, 2001):
        loss, gnorm = 2.2 + 6 * math.exp(-step / 100) + draw.gauss(0, 0.05), 0.3 + abs(draw.gauss(0, 0.05))
        if guard.skip_reason(measured(loss + 2 * (step == 1500), gnorm + 2 * (step == 1500))):
            skipped.append(step)
    assert skipped == [1500]


def test_a_loss_scale_that_multiplied_the_mean_is_not_taken_over() -> None:
    guard = Guard(recipes.build("opt-tiny", ["precision=fp16"]))
    older = guard.state() | {"skipped": 3}
    older["loss_scale"] |= {"scale": 65536.0, "window": 1024, "updates": 5000}
    again = Guard(recipes.build("opt-tiny", ["precision=fp16"]))
    assert again.restore(older) is None
    assert again.loss_scale == 65536.0
    del older["v"]
    note = guard.restore(older)
    assert note is not None
    assert "begins at 4 again: that of the checkpoint, 65536," in note
    assert (guard.loss_scale, guard.skipped) == (4.0, 3), "what else the state holds still means the same"
    assert guard.state()["loss_scale"]["updates"] == 0
    assert Guard(RECIPE).restore(older) is None, "bf16 has no loss scale"


Pair = tuple[float, float]
values = st.tuples(st.floats(0.1, 20), st.floats(0.01, 20) | st.just(math.inf))


@settings(max_examples=50)
@given(st.lists(values, max_size=150), st.lists(values, max_size=20))
def test_restored_from_json_it_decides_alike(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    changes = ["precision=fp16", "guard.warm=4", "guard.deviations=1", "loss_scale.window=8"]
    recipe = recipes.build("opt-tiny", changes)
    guard, again = Guard(recipe), Guard(recipe)
    for loss, gnorm in before:
        guard.skip_reason(measured(loss, gnorm, guard.loss_scale))
    again.restore(json.loads(json.dumps(guard.state(), allow_nan=False)))
    for loss, gnorm in after:
        assert again.loss_scale == guard.loss_scale
        mine = guard.skip_reason(measured(loss, gnorm, guard.loss_scale))
        assert again.skip_reason(measured(loss, gnorm, again.loss_scale)) == mine
    assert again.state() == guard.state()


def test_a_run_skips_a_spike_and_does_so_again_after_a_resume(text: Path, tmp_path: Path) -> None:
    """One update with a rate a thousand times too high spoils the weights: the next loss and gradients are out."""
    changes = (*SMALL, "steps=40", "checkpoint_every=30", "guard.warm=20", "guard.window=30", "guard.deviations=3")
    arguments = ["--recipe", "opt-tiny", "--data", text, "--checkpoint-dir", tmp_path / "c", *set_(*changes)]
    drill = {"id": "d1", "kind": "lr", "from_step": 31, "updates": 1, "factor": 1000.0}
    found = []
    for attempt, resume in (("a1", []), ("a2", ["--resume", manifest.step_folder(tmp_path / "c", 30)])):
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "drill.json").write_text(json.dumps([drill]))
        done = train(2, *arguments, "--run-dir", tmp_path / attempt, *resume)
        assert [process.returncode for process in done] == [0, 0], done
        lines = {line["num_updates"]: line for line in telemetry(tmp_path / attempt)}
        found.append(
            [(s, lines[s]["skip"], lines[s]["skipped"], lines[s]["loss"], lines[s]["tokens"]) for s in range(31, 41)]
        )
    first = found[0]
    assert [skip for _, skip, *_ in first][:2] == [None, "out_of_band"], first
    assert first[1][4] == first[0][4], "its tokens count as trained on"
    assert found[1] == first, "the guard's windows were not saved"


FAULTS = {
    "weight": "weight layers.1.fc1.weight (rank 1)",
    "forward": "forward of layers.1.fc2 (rank 1)",
    # It has passed through attention, whose three first products are one and no modules.
    "backward": "gradient of the output of layers.0.self_attn_layer_norm (rank 1)",
}


def finds(fault: str, tp: int, *changes: str, exact: bool = True) -> str:
    recipe = build(0, tp, *changes)
    engine, data = engine_of(recipe), samples(recipe)
    here = engine.layout.rank == 1

    def run() -> None:
        forward_backward(engine, data, recipe, Progress())

    run()  # as in training, it is not the first
    layers = engine.model.layers
    if fault == "weight" and here:  # in its shard alone, as a flipped bit would
        with torch.no_grad():
            engine.local(layers[1].fc1.weight)[0] = math.nan
    if fault == "forward" and here:
        layers[1].fc2.register_forward_hook(lambda module, inputs, output: output * math.inf)
    if fault == "backward" and here:

        def spoil(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            output.register_hook(lambda gradient: gradient * math.nan)
            return output.clone()

        layers[0].self_attn.out_proj.register_forward_hook(spoil)
    return first_bad_module(engine.model, run, exact=exact)


def finds_nothing_where_sums_round_otherwise() -> str:
    return finds("none", 1, exact=False)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_first_bad_module_is_named_on_all_ranks(ranks: Ranks, fault: str, tp: int) -> None:
    found = ranks(2, finds, fault, tp)
    assert found[0] == found[1]
    if tp == 1:
        assert found[0] == FAULTS[fault]
    else:
        assert found[0].rpartition(" (")[0] == FAULTS[fault].rpartition(" (")[0]


def test_where_nothing_is_wrong_any_more_it_says_so(ranks: Ranks) -> None:
    assert ranks(1, finds, "none", 1) == ["nowhere when the batch was run again: the cause may be a hardware fault"]


def test_where_the_same_batch_may_round_otherwise_it_does_not_accuse_the_hardware_alone(ranks: Ranks) -> None:
    (found,) = ranks(1, finds_nothing_where_sums_round_otherwise)
    assert found.startswith("did not come again when the batch was run again: hardware or rounding")
