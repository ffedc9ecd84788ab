import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.trainer.harness import SMALL, Ranks, engine_of
from trainer import recipes
from trainer.data.samples import Samples
from trainer.model.opt import OPT
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import forward_backward, measure

PLAIN = [*SMALL, "model.dropout=0", "model.init_std=0.2"]
CONFIG = recipes.build("opt-tiny", PLAIN).model
# The form of OPT-350M, and a vocabulary that is padded from 500 rows to 512.
OPT_350M = ["model.norm=post", "model.embed_size=16", "model.vocab_size=500"]
SHAPES = {"pre-LN": [], "350M": OPT_350M, "post-LN": ["model.norm=post"], "projected": ["model.embed_size=16"]}


@pytest.fixture(scope="module")
def model() -> OPT:
    return OPT(CONFIG, seed=1)


def test_parameters_have_the_names_and_shapes_of_the_released_models(model: OPT) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    layer = {
        f"layers.{i}.{name}.{kind}": shape if kind == "weight" else shape[:1]
        for i in range(2)
        for kind in ("weight", "bias")
        for name, shape in {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (32, 32),
            "self_attn.v_proj": (32, 32),
            "self_attn.out_proj": (32, 32),
            "self_attn_layer_norm": (32,),
            "fc1": (128, 32),
            "fc2": (32, 128),
            "final_layer_norm": (32,),
        }.items()
    }
    assert shapes == layer | {
        "embed_tokens.weight": (512, 32),
        "embed_positions.weight": (34, 32),
        "final_layer_norm.weight": (32,),
        "final_layer_norm.bias": (32,),
        "lm_head.weight": (512, 32),
    }
    assert model.lm_head.weight is model.embed_tokens.weight


def formula(model: OPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder of arXiv 2205.01068 and its released code, written down a second time, one head at a time."""
    w = dict(model.named_parameters())
    config = model.config

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def branch(x: Tensor, norm_name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        if config.norm == "pre":
            return x + function(norm(x, norm_name))
        return norm(x + function(x), norm_name)

    def attention(y: Tensor) -> Tensor:
        q = linear(y, f"{layer}.self_attn.q_proj") * size**-0.5
        k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "kv")
        heads = []
        for h in range(config.num_heads):
            part = slice(h * size, (h + 1) * size)
            scores = (q[..., part] @ k[..., part].transpose(1, 2)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        return linear(torch.cat(heads, -1), f"{layer}.self_attn.out_proj")

    def feed_forward(y: Tensor) -> Tensor:
        return linear(linear(y, f"{layer}.fc1").clamp(min=0), f"{layer}.fc2")

    length = tokens.shape[1]
    x = w["embed_tokens.weight"][tokens]
    if config.embed_size:
        x = x @ w["project_in.weight"].T
    x = x + w["embed_positions.weight"][2 : 2 + length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    size = config.hidden_size // config.num_heads
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        x = branch(x, f"{layer}.self_attn_layer_norm", attention)
        x = branch(x, f"{layer}.final_layer_norm", feed_forward)
    activation_norm = x.norm(dim=-1).sum()
    if config.norm == "pre":
        x = norm(x, "final_layer_norm")
    if config.embed_size:
        x = x @ w["project_out.weight"].T
    return x @ w["embed_tokens.weight"][: config.vocab_size].T, activation_norm


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_published_formula(shape: str) -> None:
    model = OPT(recipes.build("opt-tiny", [*PLAIN, *SHAPES[shape]]).model, seed=1)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide where they are left out
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0 if "norm.weight" in name else 0.0, 0.3, generator=torch.Generator().manual_seed(3))
    vocab = model.config.vocab_size
    tokens = torch.randint(4, vocab, (3, 17), generator=torch.Generator().manual_seed(2))
    (logits, norm), (expected_logits, expected_norm) = model(tokens), formula(model, tokens)
    torch.testing.assert_close(logits[..., :vocab], expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=1e-4)
    assert (logits[..., vocab:] == -math.inf).all()


def one_update(model: OPT, tokens: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def test_padding_the_vocabulary_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.build("opt-tiny", [*PLAIN, "model.vocab_size=500"]).model
    tokens = torch.randint(4, 500, (4, 17), generator=torch.Generator().manual_seed(2))
    padded = OPT(config, seed=1)
    one_update(padded, tokens)
    monkeypatch.setattr(recipes, "_VOCAB_MULTIPLE", 4)
    plain = OPT(config, seed=1)
    one_update(plain, tokens)
    assert (len(padded.embed_tokens.weight), len(plain.embed_tokens.weight)) == (512, 500)
    assert not padded.embed_tokens.weight[500:].any()
    for (name, weight), (_, expected) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(weight[: len(expected)], expected, rtol=1e-5, atol=1e-6, msg=name)


def gradients_of_one_batch(dp: int, tp: int, *more: str) -> dict[str, Any]:
    """Loss, gradient norm and gradients of a model of OPT-350M's form, on one rank of a group."""
    changes = [*PLAIN, *OPT_350M, f"parallel.dp={dp}", f"parallel.tp={tp}", "model.dropout=0.1", *more]
    recipe = recipes.build("opt-tiny", changes)
    engine = engine_of(recipe)
    model = engine.model
    ids = np.random.RandomState(0).randint(4, recipe.model.vocab_size, 4000).astype(np.uint16)
    samples = Samples(ids, recipe.data.seq_len, recipe.seed)
    measured = measure(engine, forward_backward(engine, samples, recipe, Progress()), StepInputs())
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if isinstance(p.grad, DTensor)}
    gradients = {name: gradient / measured.divisor for name, gradient in gradients.items()}
    return {"loss": measured.loss, "gnorm": measured.gnorm, "gradients": gradients}


def test_the_form_of_350m_computes_the_same_on_all_layouts(ranks: Ranks) -> None:
    (alone,) = ranks(1, gradients_of_one_batch, 1, 1)
    assert len(alone["gradients"]) == 2 * 16 + 4
    assert not alone["gradients"]["embed_tokens.weight"][500:].any()
    # Where memory is short, layers are computed again and gradients are reduced after each of several micro-batches.
    short = ("checkpoint_activations=true", "data.micro_batch=2")
    offloaded = ("parallel.offload=true", "data.micro_batch=2")
    for dp, tp, more in ((2, 1, ()), (1, 2, ()), (2, 2, ()), (2, 1, short), (2, 2, short), (2, 1, offloaded)):
        for rank in ranks(dp * tp, gradients_of_one_batch, dp, tp, *more):
            assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert rank["gnorm"] == pytest.approx(alone["gnorm"], rel=1e-5)
            for name, expected in alone["gradients"].items():
                if not name.endswith("k_proj.bias"):  # whose true gradient is zero
                    torch.testing.assert_close(rank["gradients"][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_initial_weights_have_the_published_spread() -> None:
    config = recipes.build("opt-125m", ["model.vocab_size=4000", "model.num_layers=2"]).model
    for name, p in OPT(config, seed=1).named_parameters():
        if name == "embed_tokens.weight":
            assert p.shape == (4096, 768)
            assert not p[4000:].any()
            assert not p[1].any(), "the padding token's"
            assert p[2:4000].std().item() == pytest.approx(0.006, rel=0.01)
        elif name.endswith("bias"):
            assert not p.any()
        elif "layer_norm" in name:
            assert (p == 1).all()
        else:
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            assert p.std().item() == pytest.approx(0.006 / (math.sqrt(2 * 2) if residual else 1), rel=0.01), name
            assert abs(p.mean().item()) < 1e-4


def test_weights_drawn_part_by_part_are_those_of_the_whole_model() -> None:
    config = recipes.build("opt-tiny", [*SMALL, *OPT_350M]).model
    whole = OPT(config, seed=3)
    with torch.device("meta"):
        parts = OPT(config, seed=3)
    for part in (
        parts.layers[1],
        parts.layers[0],
        *(m for n, m in parts.named_children() if n not in {"layers", "lm_head"}),
    ):
        parts.draw(part, torch.device("cpu"))
    assert parts.lm_head.weight is parts.embed_tokens.weight
    for (name, found), (_, expected) in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    first = OPT(CONFIG, seed=5)
    torch.manual_seed(2)
    again, other = OPT(CONFIG, seed=5), OPT(CONFIG, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_dropout_is_on_both_branches_of_every_layer_and_nowhere_else() -> None:
    config = recipes.build("opt-tiny", [*SMALL, "model.dropout=0.5"]).model
    model = OPT(config, seed=1)
    sites = [module.site for module in model.modules() if hasattr(module, "site")]
    assert sites == [0, 1, 2, 3]
    tokens = torch.randint(4, 512, (2, 8))
    first = model(tokens)[0]
    assert torch.equal(model(tokens)[0], first)
    model.clock.step += 1
    assert not torch.allclose(model(tokens)[0], first)
    assert F.cross_entropy(first.flatten(0, 1), tokens.flatten()).isfinite()
