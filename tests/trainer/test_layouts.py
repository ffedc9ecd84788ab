"""Ways to spread a model that save memory or time change nothing of what is computed."""

import shutil
from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer import optim, recipes
from trainer.errors import UserError
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

STEPS = 3


def curve(dp: int, tp: int, *changes: str) -> tuple[list[float], list[float], set[int]]:
    """Losses, all other measurements, and over how many dimensions of the mesh the parameters are spread."""
    recipe = build(dp, tp, *changes)
    engine, data, progress = engine_of(recipe), samples(recipe), Progress()
    losses, others = [], []
    for step in range(1, STEPS + 1):
        shares = forward_backward(engine, data, recipe, progress, sample=True)
        measured = measure(engine, shares, StepInputs(), parameter_norms=True, update_norms=step > 1)
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        progress = advanced(progress, recipe)
        losses.append(measured.loss)
        others += [measured.gnorm, *measured.block_gnorms.values(), *measured.block_pnorms.values()]
        others += [*measured.block_unorms.values(), *measured.attention_logits]
    dimensions = {p.device_mesh.ndim for p in engine.model.parameters() if isinstance(p, DTensor)}
    return losses, others, dimensions


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> tuple[list[float], list[float], set[int]]:
    return ranks(1, curve, 1, 1)[0]


@pytest.fixture(scope="module")
def other_ranks() -> Iterator[Ranks]:
    """For meshes of three dimensions: for the life of a process, DTensor remembers the groups of equal meshes."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("dp", "tp", "changes"),
    [
        (4, 1, ["parallel.replicas=2"]),
        (2, 2, ["parallel.replicas=2"]),
        (2, 1, ["checkpoint_activations=true"]),
        (2, 2, ["checkpoint_activations=true"]),
        (2, 1, ["parallel.offload=true"]),
        (4, 1, ["parallel.replicas=2", "parallel.offload=true", "checkpoint_activations=true"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_the_losses_and_norms_are_those_of_one_process(
    ranks: Ranks,
    other_ranks: Ranks,
    alone: tuple[list[float], list[float], set[int]],
    dp: int,
    tp: int,
    changes: list[str],
) -> None:
    replicated = "parallel.replicas=2" in changes
    pool = other_ranks if replicated else ranks
    for losses, gnorms, dimensions in pool(dp * tp, curve, dp, tp, *changes):
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert gnorms == pytest.approx(alone[1], rel=1e-5)
        assert dimensions == {1 + replicated + (tp > 1)}


def compiled(tp: int, backend: str) -> tuple[list[float], list[float], int]:
    """Losses and norms with compiled layers, and how many graphs that took."""
    from torch._dynamo.utils import counters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        losses, gnorms, _ = curve(1, tp, "compile=true")
    return losses, gnorms, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.parametrize(
    ("tp", "backend"),
    [
        (1, "inductor"),
        pytest.param(2, "aot_eager", marks=pytest.mark.soak),
        pytest.param(2, "inductor", marks=pytest.mark.soak),
    ],
)
def test_compiled_layers_compute_the_same_and_are_compiled_once(
    alone: tuple[list[float], list[float], set[int]], tp: int, backend: str
) -> None:
    """With C++ on one rank; with tensor parallelism the same graphs, whose operations PyTorch does one by one."""
    pool = Ranks()
    try:
        losses, gnorms, graphs = pool(tp, compiled, tp, backend)[0]
    finally:
        pool.close()
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert gnorms == pytest.approx(alone[1], rel=1e-4)
    assert graphs == 2, "the first layer and all others; not each layer or each step for itself"


def test_replicas_must_divide_the_data_parallel_ranks() -> None:
    with pytest.raises(UserError, match=r"a multiple of parallel\.replicas"):
        recipes.build("opt-tiny", ["parallel.replicas=2", "parallel.dp=3"])
    with pytest.raises(UserError, match=r"parallel\.dp must be given"):
        recipes.build("opt-tiny", ["parallel.replicas=2"])
