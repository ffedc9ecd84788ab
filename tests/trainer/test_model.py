import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.harness import SMALL
from trainer import recipes
from trainer.model import OPT

CONFIG = recipes.build("opt-tiny", [*SMALL, "model.dropout=0", "model.init_std=0.2"]).model


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

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    length = tokens.shape[1]
    x = w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][2 : 2 + length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    size = CONFIG.hidden_size // CONFIG.num_heads
    for i in range(CONFIG.num_layers):
        layer = f"layers.{i}"
        y = norm(x, f"{layer}.self_attn_layer_norm")
        q = linear(y, f"{layer}.self_attn.q_proj") * size**-0.5
        k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "kv")
        heads = []
        for h in range(CONFIG.num_heads):
            part = slice(h * size, (h + 1) * size)
            scores = (q[..., part] @ k[..., part].transpose(1, 2)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.out_proj")
        y = norm(x, f"{layer}.final_layer_norm")
        x = x + linear(linear(y, f"{layer}.fc1").clamp(min=0), f"{layer}.fc2")
    return norm(x, "final_layer_norm") @ w["embed_tokens.weight"].T, x.norm(dim=-1).sum()


def test_it_computes_the_published_formula(model: OPT) -> None:
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide where they are left out
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0 if "norm.weight" in name else 0.0, 0.3, generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(4, 512, (3, 17), generator=torch.Generator().manual_seed(2))
    for found, expected in zip(model(tokens), formula(model, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_initial_weights_have_the_published_spread() -> None:
    config = recipes.build("opt-125m", ["model.vocab_size=4000", "model.num_layers=2"]).model
    for name, p in OPT(config, seed=1).named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "layer_norm" in name:
            assert (p == 1).all()
        else:
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            assert p.std().item() == pytest.approx(0.006 / (math.sqrt(2 * 2) if residual else 1), rel=0.01), name
            assert abs(p.mean().item()) < 1e-4


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
