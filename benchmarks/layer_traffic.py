"""Bytes that one layer of OPT-1.3B moves, and the kernels that it starts, counted without a GPU.

    python -m benchmarks.layer_traffic
    python -m benchmarks.layer_traffic --size 6.7b --tokens 8192 -o json

Each model runs a forward and a backward pass on the meta device, in bf16, with 2 and with 4 layers. Half of the
difference is one layer. Every operation counts as one kernel that reads each input once and writes each output once.
Views cost nothing. Matrix products and attention count as kernels, but their bytes do not count, because all models
have the same. Attention is one operation that returns a gradient for queries, keys and values.

The unit is the width of one hidden vector in bf16 (2·d bytes), per token. This is a count and not a measurement: it
says nothing about caches, and a compiler joins operations that are counted one by one here.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import recipes
from trainer.model.opt import OPT
from trainer.recipes import ModelConfig

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "opt_ops::bias_relu")
_FREE = ("aten::_unsafe_view", "aten::detach", "aten::empty", "aten::new_empty", "aten::empty_like")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a layer moves in one pass: widths of the hidden vector per token, and kernels."""

    widths: float
    kernels: float


class Count(TorchDispatchMode):
    """Counts bytes and kernels of the operations inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        result = func(*args, **(kwargs or {}))
        schema = func._schema  # noqa: SLF001  it tells which operations only make a view
        name = schema.name
        views = [each.alias_info is not None and not each.alias_info.is_write for each in schema.returns]
        if name in _FREE or (views and all(views)):
            return result
        self.kernels += 1
        if name not in _PRODUCTS and not name.startswith("layer_traffic::"):
            self.bytes += sum(_bytes(each) for each in _tensors((args, list((kwargs or {}).values()), result)))
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _tensors(each)


def _bytes(tensor: Tensor) -> int:
    """The bytes behind a tensor. What is expanded is read from one place."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(lengths).numel() * tensor.dtype.itemsize


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _attention_gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# A kernel of attention. The layouts of its results are those of its arguments.
attention = torch.library.custom_op("layer_traffic::attention", _attended, mutates_args=())
attention.register_fake(_attended)
attention_backward = torch.library.custom_op("layer_traffic::attention_backward", _attention_gradients, mutates_args=())
attention_backward.register_fake(_attention_gradients)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    return attention_backward(gradient, *ctx.saved_tensors)


attention.register_autograd(_gradients, setup_context=_keep)


@contextmanager
def one_attention() -> Iterator[None]:
    """Let all models call this file's attention."""

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return attention(q, k, v)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", call):
        yield


def ours(config: ModelConfig, kernels: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The trainer's model."""
    model = OPT(config, seed=1, kernels=kernels)
    return model, lambda tokens: model(tokens, hide=False)[0]


def plain(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The plain OPT of the tests."""
    from tests.trainer.plain_opt import PlainOPT

    model = PlainOPT(config)
    return model, model.logits


def hugging_face(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """``OPTForCausalLM``."""
    from transformers import OPTForCausalLM

    from benchmarks.train_step import hugging_face_config

    model = OPTForCausalLM(hugging_face_config(config))
    return model, lambda tokens: model(input_ids=tokens, use_cache=False).logits


MODELS: dict[str, Callable[[ModelConfig], tuple[nn.Module, Callable[[Tensor], Tensor]]]] = {
    "ours, kernels=on": lambda config: ours(config, "on"),
    "ours, kernels=off": lambda config: ours(config, "off"),
    "plain OPT": plain,
    "Hugging Face": hugging_face,
}


def passes(name: str, config: ModelConfig, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes, kernels) of the forward and of the backward pass of a whole model."""
    with torch.device("meta"), one_attention():
        model, logits = MODELS[name](config)
        model.to(torch.bfloat16).train()
        ids = torch.zeros(max(1, tokens // config.max_positions), min(tokens, config.max_positions), dtype=torch.int64)
        with Count() as forward:
            out = logits(ids)
        gradient = torch.empty_like(out)
        with Count() as backward:
            out.backward(gradient)
    return (forward.bytes, forward.kernels), (backward.bytes, backward.kernels)


def layer(name: str, size: str = "1.3b", tokens: int = 2048, dropout: float = 0.1) -> tuple[Traffic, Traffic]:
    """What one layer moves, forward and backward.

    Args:
        name: of the model in :data:`MODELS`.
        size: of the OPT.
        tokens: in the micro-batch.
        dropout: of the hidden states.
    """
    config = replace(recipes.build(f"opt-{size}").model, dropout=dropout)
    two, four = (passes(name, replace(config, num_layers=layers), tokens) for layers in (2, 4))
    unit = 2 * config.hidden_size * tokens
    forward, backward = (
        Traffic((bytes_4 - bytes_2) / 2 / unit, (kernels_4 - kernels_2) / 2)
        for (bytes_2, kernels_2), (bytes_4, kernels_4) in zip(two, four, strict=True)
    )
    return forward, backward


def main() -> None:
    """Count all models and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", default="1.3b", help="125m to 175b (default: 1.3b)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a micro-batch (default: 2048)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    options = parser.parse_args()
    rows = [
        {"model": name, "dropout": dropout, "forward": asdict(forward), "backward": asdict(backward)}
        for name in MODELS
        for dropout in (0.1, 0.0)
        for forward, backward in [layer(name, options.size, options.tokens, dropout)]
    ]
    if options.output == "json":
        print(json.dumps({"size": options.size, "tokens": options.tokens, "layers": rows}, indent=1))
        return
    print(f"one layer of OPT-{options.size}, {options.tokens} tokens, bf16, torch {torch.__version__}")
    print("A width is one hidden vector per token, read or written once. Counted, not measured.\n")
    print("| | dropout | forward, widths | kernels | backward, widths | kernels |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [f"{row[way]['widths']:.0f} | {row[way]['kernels']:.0f}" for way in ("forward", "backward")]
        print(f"| {row['model']} | {row['dropout']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
