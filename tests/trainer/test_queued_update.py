"""The update is queued before the host knows what was measured, and is applied where the host would have applied it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opt_ops.contract.fence import SupersededError
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.signals import Signals
from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer import optim
from trainer.errors import NotFiniteError
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs, StepInputs
from trainer.step.step import Steps, forward_backward, measure


class Inputs(RankInputs):
    """What a test says, with the rule that the trainer has."""

    def __init__(self, rank: int) -> None:
        self._rank, self._outside = rank, Outside(Options(), rank, Signals())
        self.superseded, self.lr_factor = False, 1.0

    def read(self, step: int) -> StepInputs:
        if self._rank != 0:
            return StepInputs()
        return StepInputs(outside=[0.0, float(self.superseded), self.lr_factor, 0.0, 0.0, 0.0, 1.0])


@contextmanager
def order_of(optimizer: torch.optim.Optimizer) -> Iterator[list[str]]:
    """While this lasts, note in which order the optimizer starts and the host waits for the sums of all ranks."""
    found, step = [], optimizer.step

    def read(self: Tensor) -> Any:
        if self.dtype == torch.float64:
            found.append("read")
        return torch._C.TensorBase.tolist(self)

    def noted() -> None:
        found.append("update")
        step()

    torch.Tensor.tolist, optimizer.step = read, noted
    try:
        yield found
    finally:
        del torch.Tensor.tolist
        optimizer.step = step


def bits(engine: Any) -> dict[str, list[bytes]]:
    """Weights, moments and step count of each shard of this rank."""
    found = {}
    for shard in engine.shards:
        state = engine.optimizer.state[shard.parameter]
        held = [engine.local(each.detach()) for each in (shard.parameter, state["exp_avg"], state["exp_avg_sq"])]
        found[shard.name] = [each.numpy().tobytes() for each in (*held, state["step"])]
    return found


def one_step(case: str, dp: int = 1, tp: int = 1, *changes: str) -> dict[str, Any]:
    """What becomes of the second update of a run, in which something is wrong."""
    half = ["precision=fp16"] if case == "overflow" else []
    recipe = build(dp, tp, "guard.warm=2", *half, *changes)
    engine, data, guard = engine_of(recipe), samples(recipe), Guard(recipe)
    inputs, factors = Inputs(engine.layout.rank), []
    checksums = Checksums(engine.model, engine.optimizer, engine.layout, 2 if case == "checksums" else 0)
    steps = Steps(recipe, factors, (), engine, data, guard, inputs, checksums)
    progress = steps.take(Progress()).progress
    if case == "superseded":
        inputs.superseded = True
    if case == "drill":
        inputs.lr_factor = 0.5
    if case == "half the rate":
        factors.append((0, 0.5))
    if case == "checksums":
        checksums.updated(2, None)
    if case == "out of band":
        for usual in (guard._losses, guard._gnorms):
            usual.clear()
            usual.extend((1e-3, 2e-3))
    if case in ("not finite", "overflow"):
        gradients, spoiled = engine.gradients, torch.inf if case == "overflow" else torch.nan
        engine.gradients = lambda: [gradient.fill_(spoiled) for gradient in gradients()]
    before, fault, outcome = bits(engine), None, None
    with order_of(engine.optimizer) as order:
        try:
            outcome = steps.take(progress)
        except SupersededError as error:
            fault = error
    after = bits(engine)
    return {
        "order": order,
        "unchanged": after == before,
        "all changed": all(one[0] != two[0] for one, two in zip(before.values(), after.values(), strict=True)),
        "bits": after,
        "skip": outcome and outcome.skip,
        "fault": type((outcome and outcome.fault) or fault),
        "lr": engine.optimizer.param_groups[0]["lr"],
    }


def test_the_update_is_queued_before_the_host_waits(ranks: Ranks) -> None:
    (usual,) = ranks(1, one_step, "usual")
    assert usual["order"] == ["update", "read"]
    assert usual["all changed"]
    (compared,) = ranks(1, one_step, "checksums")
    assert compared["order"] == ["read", "update"], "any rank may hold wrong data"
    assert compared["bits"] == usual["bits"], "a resumed run compares where the first one did not"


@pytest.mark.parametrize(
    ("case", "skip", "fault"),
    [
        ("superseded", None, SupersededError),
        ("not finite", None, NotFiniteError),
        ("overflow", "overflow", type(None)),
        ("out of band", "out_of_band", type(None)),
    ],
)
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_an_update_that_must_not_be_applied_changes_no_bit(
    ranks: Ranks, case: str, skip: str | None, fault: type, dp: int, tp: int
) -> None:
    for found in ranks(dp * tp, one_step, case, dp, tp):
        assert (found["skip"], found["fault"]) == (skip, fault)
        assert found["order"][:2] == ["update", "read"]
        assert found["order"].count("update") == 1
        assert found["unchanged"]


def test_a_drill_changes_the_rate_of_the_update_at_hand(ranks: Ranks) -> None:
    (drilled,), (expected,) = ranks(1, one_step, "drill"), ranks(1, one_step, "half the rate")
    assert drilled["order"] == ["update", "read", "update"], "the first one must not be applied"
    assert drilled["bits"] == expected["bits"]
    assert drilled["lr"] == expected["lr"]


def test_fairscale_queues_it_too(ranks: Ranks) -> None:
    pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")
    for found in ranks(2, one_step, "usual", 2, 1, "engine=fairscale"):
        assert (found["order"], found["all changed"]) == (["update", "read"], True)
    for found in ranks(2, one_step, "out of band", 2, 1, "engine=fairscale"):
        assert (found["skip"], found["unchanged"]) == ("out_of_band", True)


def clipped_update() -> tuple[set[str], float]:
    recipe = build(1, 1, "optim.clip_norm=1e-3")
    engine, data = engine_of(recipe), samples(recipe)
    measured = measure(engine, forward_backward(engine, data, recipe, Progress()), StepInputs())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        engine.update(measured.gnorm, 1e-3, measured.divisor)
    return {str(event.key) for event in profiled.key_averages()}, measured.gnorm


def test_clipping_has_no_pass_over_the_gradients_of_its_own(ranks: Ranks) -> None:
    ((operations, gnorm),) = ranks(1, clipped_update)
    assert gnorm > 1e-3
    assert "aten::_fused_adamw_" in operations
    assert not operations & {"aten::mul_", "aten::_foreach_mul_", "aten::div_", "aten::_foreach_div_"}, operations


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 1.0])
def test_where_it_is_forbidden_the_optimizer_changes_nothing(spoiled: float) -> None:
    layer = torch.nn.Linear(3, 5)
    optimizer = optim.build(layer.parameters(), build().optim)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, spoiled)
    optim.set_learning_rate(optimizer, 0.1)

    def held() -> list[Tensor]:
        return [t.clone() for p in layer.parameters() for t in (p.detach(), *optimizer.state[p].values())]

    before = held()
    optim.update(optimizer, torch.tensor(spoiled), unless=torch.tensor(True))
    assert all(map(torch.equal, before, held()))
    optim.update(optimizer, torch.tensor(0.5), unless=torch.tensor(False))
    assert optimizer.state[layer.weight]["step"] == 1
    assert not torch.equal(before[0], layer.weight)
    assert not hasattr(optimizer, "found_inf"), "the next update would read it"
