"""fairscale's FSDP computes what FSDP2 does, and their checkpoints are alike. All of it runs, but on CPUs.

CUDA's streams are replaced (tests/trainer/cuda_stand_in.py). The collectives are real, on gloo.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from opt_ops.contract import manifest
from tests.trainer.cuda_stand_in import stand_in
from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_checkpoint import Training
from tests.trainer.test_parallel import build as recipe_of
from tests.trainer.test_parallel import samples
from trainer import optim
from trainer.evaluation import _evaluating
from trainer.parallel.engine import Engine
from trainer.parallel.flat_part import rectangles
from trainer.recipes import Recipe
from trainer.step.measured import Progress, StepMeasurements
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")

SAVED, STEPS = 2, 4


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """While this lasts, ``fsdp`` among the engines is fairscale's FSDP on a CPU."""
    from trainer.model.opt import OPT
    from trainer.parallel import build

    def fsdp(recipe: Any, layout: Any) -> Any:
        from trainer.parallel.fairscale_fsdp import FairscaleFsdpEngine

        with torch.device("meta"):
            model = OPT(recipe.model, recipe.seed)
        model.use(build._ops(recipe, layout.device))
        return FairscaleFsdpEngine(model, recipe, layout)

    if name != "fsdp":
        yield
        return
    with stand_in(), mock.patch.object(build, "build", fsdp):
        yield


def losses(
    name: str, dp: int, tp: int, folder: Path, *changes: str, save: bool = False, load: bool = False
) -> list[float]:
    """Of the steps up to the last, with a checkpoint after SAVED of them, or from one on."""
    with engine(name):
        asked = "fairscale" if name == "fsdp" else name
        training = Training(folder, dp, tp, f"engine={asked}", *changes)
        if load:
            training.load(manifest.step_folder(folder, SAVED))
        found = []
        while training.progress.step < STEPS:
            found.append(training.step())
            if save and training.progress.step == SAVED:
                training.save()
                assert training.checkpointer.wait()
        return found


@pytest.fixture(scope="module")
def expected(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return ranks(1, losses, "fsdp2", 1, 1, tmp_path_factory.mktemp("fsdp2"))[0]


@pytest.mark.parametrize(
    ("dp", "tp", "change"),
    [
        (1, 1, "data.micro_batch=2"),
        (2, 1, "data.micro_batch=2"),  # two micro-batches: the first one does not sum over ranks
        (3, 1, "data.micro_batch=1"),  # parts that do not divide: padding, and a rank without a sequence
        (1, 2, "data.micro_batch=8"),
        (2, 2, "checkpoint_activations=true"),
    ],
)
def test_its_losses_are_those_of_fsdp2(
    ranks: Ranks, tmp_path: Path, expected: list[float], dp: int, tp: int, change: str
) -> None:
    for rank in ranks(dp * tp, losses, "fsdp", dp, tp, tmp_path, change):
        assert rank == pytest.approx(expected, rel=1e-5)


def test_it_goes_on_from_its_own_checkpoint_to_the_last_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks(4, losses, "fsdp", 2, 2, tmp_path, save=True)
    assert ranks(4, losses, "fsdp", 2, 2, tmp_path, load=True) == [rank[SAVED:] for rank in whole]


@pytest.mark.parametrize(
    ("source", "target"),
    [("fsdp", "fsdp2"), ("fsdp2", "fsdp"), pytest.param("fairscale", "fsdp", marks=pytest.mark.soak)],
)
def test_each_engine_goes_on_from_the_others_checkpoint_in_another_layout(
    ranks: Ranks, tmp_path: Path, expected: list[float], source: str, target: str
) -> None:
    ranks(4, losses, source, 2, 2, tmp_path, save=True)
    for rank in ranks(3, losses, target, 3, 1, tmp_path, load=True):
        assert len(rank) == STEPS - SAVED
        assert rank == pytest.approx(expected[SAVED:], rel=1e-5)


def recipe(dp: int, tp: int, name: str, precision: str) -> Recipe:
    asked = "fairscale" if name == "fsdp" else name
    return recipe_of(dp, tp, f"engine={asked}", f"precision={precision}", "data.micro_batch=2")


def steps(made: Engine, asked: Recipe, count: int) -> Iterator[StepMeasurements]:
    data, progress = samples(asked), Progress()
    scale = 8.0 if asked.precision == "fp16" else None
    for step in range(1, count + 1):
        shares = forward_backward(made, data, asked, progress, scale, sample=True)
        found = measure(made, shares, StepInputs(), parameter_norms=True, update_norms=step > 1)
        made.update(found.gnorm, optim.learning_rate(step, asked.optim), shares.divisor)
        progress = advanced(progress, asked)
        yield found


def evaluated(made: Engine, asked: Recipe) -> float:
    with _evaluating(made), made.micro_step(last=True):
        loss, _ = made.loss(*samples(asked).batch(0, 2))
    return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()


def numbers(name: str, dp: int, tp: int, precision: str) -> list[list[float]]:
    """All that some steps measure, each with a loss without dropout after it."""
    with engine(name):
        asked, found = recipe(dp, tp, name, precision), []
        made = engine_of(asked)
        for values in steps(made, asked, 4):
            norms = (values.block_gnorms, values.block_pnorms, values.block_unorms)
            by_block = [each[block] for each in norms for block in sorted(each)]
            found.append([values.loss, values.activation_norm, *values.attention_logits, *by_block])
            found[-1].append(evaluated(made, asked))
        return found


@pytest.mark.parametrize(
    ("dp", "tp", "precision", "rel"),
    [(2, 2, "fp32", 1e-4), (2, 1, "bf16", 2e-2), (1, 2, "fp16", 2e-2)],
)
def test_norms_by_block_attention_logits_and_evaluation_are_those_of_fsdp2(
    ranks: Ranks, dp: int, tp: int, precision: str, rel: float
) -> None:
    first = ranks(1, numbers, "fsdp2", 1, 1, precision)[0]
    for rank in ranks(dp * tp, numbers, "fsdp", dp, tp, precision):
        for step, other in zip(rank, first, strict=True):
            assert step == pytest.approx(other, rel=rel, abs=1e-6)


def hooks_by_step(precision: str, name: str = "fsdp") -> list[int]:
    """How often FSDP's hook for gradients ran in each step."""
    with engine(name):
        from fairscale.nn.data_parallel import FullyShardedDataParallel as Wrapper

        asked = recipe(1, 1, name, precision)
        made = engine_of(asked)
        with mock.patch.object(
            Wrapper, "_post_backward_hook", autospec=True, side_effect=Wrapper._post_backward_hook
        ) as hook:
            counts = [hook.call_count for _ in steps(made, asked, 4)]
    return [after - before for before, after in pairwise([0, *counts])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_later_step_runs_no_more_hooks_than_the_first(ranks: Ranks, precision: str) -> None:
    first, *others = ranks(1, hooks_by_step, precision)[0]
    assert first > 0
    assert others == [first] * 3


@pytest.mark.parametrize(("begin", "end"), [(0, 12), (1, 3), (2, 4), (3, 11), (4, 8), (5, 12), (7, 7), (0, 1)])
def test_a_range_is_cut_into_rectangles_that_cover_it_once(begin: int, end: int) -> None:
    whole, covered = torch.arange(12).view(3, 4), torch.zeros(3, 4)
    pieces = list(rectangles(whole.flatten()[begin:end], begin, whole.shape))
    assert len(pieces) <= 3
    for (row, column), piece in pieces:
        place = slice(row, row + piece.shape[0]), slice(column, column + piece.shape[1])
        assert torch.equal(whole[place], piece)
        covered[place] += 1
    assert covered.flatten().tolist() == [float(begin <= i < end) for i in range(12)]
