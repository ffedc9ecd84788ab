"""A flipped bit ends training, and the rank that has it is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from opt_ops.contract.environment import place_from_environment
from tests.trainer.harness import Ranks, finish, settings, start, telemetry, wait_for
from tests.trainer.test_parallel import build as recipe_of
from tests.trainer.test_parallel import samples
from tests.trainer.test_train import arguments
from trainer.model.opt import OPT
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.step.checksums import Checksums, ChecksumVerdict, checksum, flip_bit
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

SHARDS, GATHERED, REPLICATED, COUNTERS = "own shards", "gathered", "replicated", "position in the data"


def damaged_training(dp: int, tp: int, damage: str, rank: int, *changes: str) -> tuple[ChecksumVerdict | None, ...]:
    """Five updates, with a look after every second one, and damage on one rank before the third."""
    recipe = recipe_of(dp, tp, *changes)
    place = place_from_environment(os.environ)
    layout = mesh.start(place, dp, tp, recipe.parallel.replicas)
    engine = build(recipe, layout)
    model, optimizer = engine.model, engine.optimizer
    checksums, progress, verdicts = Checksums(model, optimizer, layout, every=2), Progress(), []
    data = samples(recipe)
    for step in range(1, 6):
        shares = forward_backward(engine, data, recipe, progress)
        mine = layout.rank == rank and step == 3
        if mine and damage == SHARDS:
            flip_bit(optimizer.state[model.layers[1].fc1.weight]["exp_avg"].to_local())
        told = (
            damaged_copy(model, checksums)
            if mine and damage == GATHERED
            else checksums.values_to_compare(progress.data_position)
        )
        measured = measure(engine, shares, StepInputs(), told)
        verdicts.append(checksums.judge(measured.checksums))
        engine.update(measured.gnorm, 1e-3, measured.divisor)
        progress = advanced(progress, recipe)
        if layout.rank == rank and step == 2:
            if damage == REPLICATED:
                flip_bit(model.layers[0].final_layer_norm.weight.to_local())
            if damage == COUNTERS:
                optimizer.state[model.layers[0].fc1.weight]["step"] += 1
        checksums.updated(step, None)
    return tuple(verdicts)


def offloaded() -> str:
    """The device of the values to compare, where parameters are gathered on another device than the shards are on."""
    recipe = recipe_of(1, 1)
    layout = mesh.start(place_from_environment(os.environ), 1, 1)
    engine = build(recipe, layout)
    checksums = Checksums(engine.model, engine.optimizer, layout, every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_gathered", lambda: torch.zeros((), dtype=torch.int64, device="meta"))
        values = checksums.values_to_compare(0)
    assert values is not None
    return values.device.type


def test_shards_on_the_host_are_compared_beside_parameters_on_a_gpu(ranks: Ranks) -> None:
    assert ranks(1, offloaded) == ["meta"]


def damaged_copy(model: OPT, checksums: Checksums) -> torch.Tensor | None:
    """A bit flips in the copy that this rank has gathered of one layer."""
    layer = model.layers[1]
    assert isinstance(layer, FSDPModule)
    gather = layer.unshard

    def unshard() -> None:
        gather()
        weight = layer.fc2.weight
        with torch.no_grad():
            flip_bit(weight.to_local() if hasattr(weight, "to_local") else weight)

    layer.unshard = unshard
    try:
        return checksums.values_to_compare(8 * 2)
    finally:
        del layer.unshard


REPLICAS = "parallel.replicas=2"


@pytest.mark.parametrize(
    ("dp", "tp", "changes"),
    [
        pytest.param(1, 1, (), marks=pytest.mark.soak),
        pytest.param(3, 1, (), marks=pytest.mark.soak),
        (2, 2, ()),
        (4, 1, (REPLICAS,)),
    ],
)
def test_ranks_that_are_well_agree(ranks: Ranks, dp: int, tp: int, changes: tuple[str, ...]) -> None:
    for verdicts in ranks(dp * tp, damaged_training, dp, tp, "none", 0, *changes):
        assert verdicts == (ChecksumVerdict(), None, ChecksumVerdict(), None, ChecksumVerdict())


@pytest.mark.parametrize(
    ("dp", "tp", "changes", "damage", "rank", "named", "certain"),
    [
        pytest.param(1, 1, (), SHARDS, 0, (0,), True, marks=pytest.mark.soak),
        (2, 2, (), SHARDS, 2, (2,), True),
        (3, 1, (), GATHERED, 2, (2,), True),
        (2, 1, (), GATHERED, 1, (0, 1), False),
        (2, 2, (), GATHERED, 3, (1, 3), False),
        (2, 2, (), REPLICATED, 3, (2, 3), False),
        (4, 1, (REPLICAS,), SHARDS, 3, (3,), True),
        (3, 1, (), COUNTERS, 1, (1,), True),
    ],
)
def test_the_rank_with_the_flipped_bit_is_named(
    ranks: Ranks,
    dp: int,
    tp: int,
    changes: tuple[str, ...],
    damage: str,
    rank: int,
    named: tuple[int, ...],
    certain: bool,
) -> None:
    told = ranks(dp * tp, damaged_training, dp, tp, damage, rank, *changes)
    assert len(set(told)) == 1, "all ranks hear the same"
    before, _, verdict, *_ = told[0]
    assert before == ChecksumVerdict()
    assert verdict is not None
    assert (verdict.ranks, verdict.certain) == (named, certain)
    assert damage in verdict.what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_bit_changes_the_sum(dtype: torch.dtype) -> None:
    tensors = [torch.arange(7).to(dtype), torch.arange(12).to(dtype).reshape(3, 4)]
    size = tensors[1].element_size()
    words = {2: torch.int16, 4: torch.int32}[size]
    before = checksum(tensors)
    for bit in range(8 * size):
        flipped = tensors[1].clone()
        flipped.view(words)[1, 2] ^= torch.tensor(1).bitwise_left_shift(bit).to(words)
        assert checksum([tensors[0], flipped]) != before, bit
    assert checksum(reversed(tensors)) != before


def run(text: Path, folder: Path, drills: list[dict[str, object]], *changes: str) -> list[int]:
    wait: Callable[[], bool] = (folder / "a1").exists
    processes = start(2, *arguments(folder, text, "a1", *settings("steps=100000", "checkpoint_every=5", *changes)))
    wait_for(wait, "no run folder")
    path = folder / "a1" / "drill.json"
    path.with_suffix(".tmp").write_text(json.dumps(drills))
    path.with_suffix(".tmp").replace(path)
    done = finish(processes)
    assert all("data is corrupt on rank 1: its own shards changed" in process.stderr for process in done), done
    return [process.returncode for process in done]


def test_a_drill_ends_with_the_rank_named_in_telemetry_and_by_its_exit_code(text: Path, tmp_path: Path) -> None:
    flip = {"id": "d1", "kind": "flip-bit", "from_step": 12, "rank": 1}
    assert run(text, tmp_path, [flip], "checksum_every=5") == [87, 85]
    lines = telemetry(tmp_path / "a1")
    compared = {line["num_updates"]: line["checksums"]["ranks"] for line in lines if line["checksums"]}
    last = lines[-1]["num_updates"]
    assert last >= 13
    assert compared.pop(last) == [1]
    assert compared == {step: [] for step in range(1, last, 5)}
    assert lines[-1]["tokens"] == lines[-2]["tokens"], "the update was not applied"


def test_without_checksums_nothing_is_compared(text: Path, tmp_path: Path) -> None:
    ranks = start(2, *arguments(tmp_path, text, "a1", *settings("steps=3", "checksum_every=0")))
    assert [process.returncode for process in finish(ranks)] == [0, 0]
    assert [line["checksums"] for line in telemetry(tmp_path / "a1")] == [None] * 3
