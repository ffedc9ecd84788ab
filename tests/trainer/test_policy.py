"""What FSDP2 moves within an update: the policy, and that the engine follows it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer import optim, recipes
from trainer.parallel import policy
from trainer.parallel.memory import GIB
from trainer.parallel.policy import FsdpPolicy
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

EARLIER = FsdpPolicy(reduces_each=False, keeps_weights=False)


class Casts(TorchDispatchMode):
    """Counts the casts of each of ``tensors``, by name, and the gathers over ranks, each of a layer or the rest."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
        self.by_name = dict.fromkeys(tensors, 0)
        self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += func is torch.ops.fsdp.all_gather_copy_in.default
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], DTensor):
            name = self._names.get(args[0].untyped_storage().data_ptr())
            if name is not None:
                self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


def two_updates(forced: FsdpPolicy | None, *changes: str) -> dict[str, Any]:
    """Two updates of four micro-batches in bf16, and the casts of parameters in the second one."""
    recipe = build(0, 1, "precision=bf16", "optim.eps=1e-8", *changes)
    real = policy.choose
    if forced:
        policy.choose = lambda *_, **__: forced
    try:
        engine = engine_of(recipe)
    finally:
        policy.choose = real
    data, progress, losses = samples(recipe), Progress(), []
    for step in (1, 2):
        with Casts({s.name: engine.local(s.parameter.detach()) for s in engine.shards}) as casts:
            shares = forward_backward(engine, data, recipe, progress)
        only_shards = all(isinstance(p, DTensor) for p in engine.model.parameters())
        measured = measure(engine, shares, StepInputs())
        losses.append((measured.loss, measured.gnorm))
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), shares.divisor)
        progress = advanced(progress, recipe)
    weights = {s.name: engine.local(s.parameter.detach()).clone() for s in engine.shards}
    return {
        "casts": casts.by_name,
        "gathers": casts.gathers,
        "only shards": only_shards,
        "losses": losses,
        "weights": weights,
    }


@pytest.mark.parametrize("recompute", [False, True])
def test_one_rank_casts_each_weight_once_in_an_update(ranks: Ranks, recompute: bool) -> None:
    change = f"checkpoint_activations={str(recompute).lower()}"
    (now,), (before,) = ranks(1, two_updates, None, change), ranks(1, two_updates, EARLIER, change)
    assert set(now["casts"].values()) == {1}
    assert max(before["casts"].values()) == 8, "two passes of four micro-batches"
    assert now["only shards"]
    assert now["losses"] == before["losses"]
    assert all(torch.equal(now["weights"][name], weight) for name, weight in before["weights"].items())


def test_spread_ranks_gather_for_each_pass(ranks: Ranks) -> None:
    rank, _ = ranks(2, two_updates, None)
    assert rank["gathers"] == 2 * (2 * 2 + 1), "of two micro-batches: two layers in two passes, the rest once"
    assert rank["only shards"]


@pytest.mark.parametrize(
    ("dp", "changes", "expected"),
    [
        (1, [], FsdpPolicy(reduces_each=False, keeps_weights=True)),
        (1, ["checkpoint_activations=true"], FsdpPolicy(reduces_each=False, keeps_weights=True)),
        (1, ["parallel.offload=true"], FsdpPolicy(reduces_each=True, keeps_weights=False)),
        (4, [], FsdpPolicy(reduces_each=False, keeps_weights=False)),
        (4, ["checkpoint_activations=true"], FsdpPolicy(reduces_each=True, keeps_weights=False)),
        (4, ["parallel.dp=4", "parallel.replicas=4"], FsdpPolicy(reduces_each=False, keeps_weights=True)),
    ],
)
def test_the_policy_is_a_table(dp: int, changes: list[str], expected: FsdpPolicy) -> None:
    assert policy.choose(build(0, 1, *changes), dp) == expected


def test_gathered_weights_are_kept_only_where_they_fit() -> None:
    recipe = recipes.build("opt-6.7b")
    assert policy.choose(recipe, 8, 140 * GIB).keeps_weights
    assert not policy.choose(recipe, 8, 64 * GIB).keeps_weights
    assert not policy.choose(recipe, 1, 120 * GIB).keeps_weights
    assert not policy.choose(recipes.build("opt-6.7b", ["parallel.offload=true"]), 1, 10000 * GIB).keeps_weights
