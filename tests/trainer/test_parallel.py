"""Every layout computes what one plain process computes, dropout included."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from opt_ops.contract.environment import place_from_environment
from tests.trainer.harness import SMALL, Ranks, engine_of
from trainer import optim, recipes
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.model.opt import OPT
from trainer.parallel import mesh
from trainer.recipes import Recipe
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

STEPS = 3
# (dp, tp, micro_batch): three ranks share eight sequences as 3, 3, 2; one at a time, the last has none for its third
# turn.
LAYOUTS = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 2), (3, 1, 1), (3, 1, 2), (3, 1, 8), (1, 1, 3)]


def build(dp: int = 1, tp: int = 1, *changes: str) -> Recipe:
    """With a larger epsilon, because Adam would else blow up rounding errors of gradients that ought to be zero."""
    common = [*SMALL, "optim.eps=1e-4", "optim.warmup_steps=2", "optim.clip_norm=0.5", "data.micro_batch=2"]
    return recipes.build("opt-tiny", [*common, f"parallel.dp={dp}", f"parallel.tp={tp}", *changes])


def samples(recipe: Recipe) -> Samples:
    ids = np.random.RandomState(0).randint(4, recipe.model.vocab_size, 4000).astype(np.uint16)
    return Samples(ids, recipe.data.seq_len, recipe.seed)


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach().clone()


def sharded_training(dp: int, tp: int, micro_batch: int) -> dict[str, Any]:
    """A few updates as the trainer does them, on one rank of a group; gradients and weights gathered."""
    recipe = build(dp, tp, f"data.micro_batch={micro_batch}")
    engine = engine_of(recipe)
    model = engine.model
    tied = [model.lm_head.weight is model.embed_tokens.weight]
    data, progress = samples(recipe), Progress()
    losses, gnorms, activation_norms, gradients = [], [], [], {}
    for step in range(1, STEPS + 1):
        measured = measure(engine, forward_backward(engine, data, recipe, progress), StepInputs())
        losses.append(measured.loss)
        gnorms.append(measured.gnorm)
        activation_norms.append(measured.activation_norm)
        if step == 1:
            gradients = {n: whole(p.grad) / measured.divisor for n, p in model.named_parameters() if p.grad is not None}
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        progress = advanced(progress, recipe)
    tied.append(model.lm_head.weight is model.embed_tokens.weight)
    return {
        "tied": tied,
        "losses": losses,
        "gnorms": gnorms,
        "activation norms": activation_norms,
        "gradients": gradients,
        "weights": {name: whole(p) for name, p in model.named_parameters()},
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same updates by PyTorch's own means: no group, no mesh, no wrapper, the whole batch at once."""
    recipe = build()
    model = OPT(recipe.model, recipe.seed)
    config = recipe.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    losses, gnorms, activation_norms, gradients = [], [], [], {}
    batch = recipe.data.global_batch
    for step in range(1, STEPS + 1):
        model.clock.step, model.clock.first_sample = step, (step - 1) * batch
        inputs, targets = samples(recipe).batch(model.clock.first_sample, batch)
        optimizer.zero_grad()
        logits, activation_norm = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        activation_norms.append(activation_norm.item() / inputs.numel())
        if step == 1:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gnorms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item())
        optimizer.param_groups[0]["lr"] = optim.learning_rate(step, config)
        optimizer.step()
    return {
        "losses": losses,
        "gnorms": gnorms,
        "activation norms": activation_norms,
        "gradients": gradients,
        "weights": dict(model.named_parameters()),
    }


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "dp{}×tp{}×micro{}".format(*layout))
def trained(request: pytest.FixtureRequest, ranks: Ranks) -> list[dict[str, Any]]:
    dp, tp, micro_batch = request.param
    return ranks(dp * tp, sharded_training, dp, tp, micro_batch)


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        # A key bias shifts all scores of a query alike, so its true gradient is zero: judge it by the query bias's.
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        errors[name] = ((found[name] - value).norm() / scale).item()
    return errors


def test_gradients_are_those_of_one_plain_process(trained: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    for rank in trained:
        errors = relative_errors(rank["gradients"], plain["gradients"])
        assert max(errors.values()) < 1e-5, errors


def test_weights_agree_after_some_updates(trained: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    start = dict(OPT(build().model, build().seed).named_parameters())

    def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (weight - start[name]).detach() for name, weight in weights.items()}

    errors = relative_errors(moved(trained[0]["weights"]), moved(plain["weights"]))
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("what", ["losses", "gnorms", "activation norms"])
def test_what_is_measured_is_that_of_the_whole_batch(
    trained: list[dict[str, Any]], plain: dict[str, Any], what: str
) -> None:
    for rank in trained:
        assert rank[what] == pytest.approx(plain[what], rel=1e-5)


def test_gradients_were_clipped(plain: dict[str, Any]) -> None:
    assert min(plain["gnorms"]) > build().optim.clip_norm, "else the comparison of weights does not test clipping"


def test_input_and_output_embedding_stay_tied(trained: list[dict[str, Any]]) -> None:
    assert [rank["tied"] for rank in trained] == [[True, True]] * len(trained)


@pytest.mark.parametrize(
    ("changes", "world", "why"),
    [
        (["parallel.tp=3"], 3, "model.num_heads=4 is not a multiple of parallel.tp=3"),
        (["parallel.tp=3", "model.hidden_size=48", "model.num_heads=3"], 3, "the padded model.vocab_size=512"),
        (["parallel.tp=2", "data.seq_len=31"], 2, "data.seq_len=31"),
        (["parallel.dp=2", "parallel.tp=2"], 3, "3 processes cannot form parallel.dp=2 × parallel.tp=2"),
        (["parallel.tp=2"], 3, "3 processes cannot form"),
        (["parallel.tp=2"], 1, "1 process cannot form"),
        ([], 9, "data.global_batch=8 leaves some of 9 data-parallel ranks without a sequence"),
        (["parallel.tp=2", "data.global_batch=1"], 4, "data.global_batch=1 leaves some of 2 data-parallel ranks"),
    ],
)
def test_an_impossible_layout_is_the_users_error(changes: list[str], world: int, why: str) -> None:
    recipe = recipes.build("opt-tiny", [*SMALL, *changes])
    with pytest.raises(UserError, match=why):
        mesh.check_layout(recipe, world)


def test_dp_takes_what_tp_leaves() -> None:
    assert mesh.check_layout(recipes.build("opt-tiny", ["parallel.tp=2"]), 8) == (4, 2)


def disagreement() -> str:
    place = place_from_environment(os.environ)
    mesh.start(place, place.world, 1)
    try:
        mesh.require_agreement("the data", "sha256:1" if place.rank == 1 else "sha256:0")
    except UserError as error:
        return str(error)
    return "no objection"


def test_ranks_that_disagree_stop_and_say_who_differs(ranks: Ranks) -> None:
    for message in ranks(2, disagreement):
        assert "the data differs between ranks" in message
        assert "[1]" in message
