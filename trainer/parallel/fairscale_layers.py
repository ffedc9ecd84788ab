"""fairscale's tensor-parallel layers, which both of its engines use, and the groups of ranks that these need.

There is no sequence parallelism: between layers, tensor-parallel ranks hold the whole sequence.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as Split

from trainer.errors import UserError
from trainer.model.fused import LinearReLU
from trainer.model.opt import OPT
from trainer.parallel.mesh import Layout

try:
    from fairscale.nn.model_parallel import initialize, layers, mappings
except ImportError as error:
    raise UserError(
        f"engine=fairscale needs the package fairscale, which cannot be imported ({error}): install "
        "opt-ops[fairscale], or use engine=fsdp2."
    ) from error

# Layers that tensor-parallel ranks share, by column or by row. All ranks hold the other layers whole.
_COLUMN = ("q_proj", "k_proj", "v_proj", "fc1")
_ROW = ("out_proj", "fc2")


def form_groups(layout: Layout) -> torch.distributed.ProcessGroup:
    """Form fairscale's groups of ranks. Returns the group of data-parallel ranks of this rank."""
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints the sizes of its groups
        initialize.destroy_model_parallel()  # left by another engine in this process, as in tests
        initialize.initialize_model_parallel(layout.tp)
    return initialize.get_data_parallel_group()


def split_layer(layer: nn.Module, layout: Layout) -> None:
    """Replace the linear layers of a decoder layer by those of fairscale, with this rank's part of the weights."""
    for parent in layer.modules():
        for name, child in list(parent.named_children()):
            if name in (*_COLUMN, *_ROW):
                _replace(parent, name, child, layout)
    layer.get_submodule("self_attn").register_forward_pre_hook(_sum_gradients)


def split_outside(model: OPT, layout: Layout) -> None:
    """Replace token embeddings and output layer by those of fairscale, tied again."""
    for name in ("embed_tokens", "lm_head"):
        _replace(model, name, model.get_submodule(name), layout)
    model.lm_head.weight = model.embed_tokens.weight


def placement(name: str) -> Split | Replicate:
    """How tensor-parallel ranks hold the parameter ``name``: split along a dimension, or whole."""
    *_, module, kind = name.split(".")
    if module in _COLUMN or module in ("embed_tokens", "lm_head"):
        return Split(0)
    if module in _ROW and kind == "weight":
        return Split(1)
    return Replicate()


def loss_sum(model: OPT, logits: Tensor, targets: Tensor, layout: Layout) -> Tensor:
    """The loss in nats, summed over all tokens.

    Args:
        model: has the op.
        logits: of this rank's part of the vocabulary, [batch, sequence, words].
        targets: the tokens to predict, [batch, sequence].
        layout: says which part it is.
    """
    rows, vocab_size = logits.flatten(0, 1), model.config.vocab_size
    group = initialize.get_model_parallel_group() if layout.tp > 1 else None
    first = layout.tp_rank * rows.shape[1]
    return model.ops.cross_entropy(rows, targets.flatten(), vocab_size, first, group).sum()


def _sum_gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The input as it is. What the ranks of a tensor-parallel group find for its gradient is summed."""
    return mappings.copy_to_model_parallel_region(inputs[0])


class _ColumnReLU(layers.ColumnParallelLinear):
    """:class:`trainer.model.fused.LinearReLU` with a part of the outputs."""

    op: Callable[..., Any]

    def forward(self, input_: Tensor) -> Tensor:
        """[..., inputs] → [..., part of the outputs]."""
        return self.op(mappings.copy_to_model_parallel_region(input_), self.weight, self.bias)


def _replace(parent: nn.Module, name: str, old: nn.Module, layout: Layout) -> None:
    if isinstance(old, nn.Embedding):
        new = layers.VocabParallelEmbedding(old.num_embeddings, old.embedding_dim, init_method=_not_drawn)
    else:
        assert isinstance(old, nn.Linear)
        new = _linear(old, name)
    new.to(next(old.parameters()).device)  # fairscale allocates on the CPU
    _take_over(old, new, name, layout)
    setattr(parent, name, new)


def _linear(old: nn.Linear, name: str) -> nn.Module:
    sizes = old.in_features, old.out_features
    if name in _ROW:
        return layers.RowParallelLinear(*sizes, input_is_parallel=True, init_method=_not_drawn)
    if isinstance(old, LinearReLU):
        new = _ColumnReLU(*sizes, gather_output=False, init_method=_not_drawn)
        new.op = old.op
        return new
    bias = old.bias is not None
    return layers.ColumnParallelLinear(*sizes, bias=bias, gather_output=False, init_method=_not_drawn)


def _not_drawn(weight: Tensor) -> Tensor:
    """No initial values: those of the layer that is replaced follow."""
    return weight


@torch.no_grad()
def _take_over(old: nn.Module, new: nn.Module, name: str, layout: Layout) -> None:
    for kind, parameter in old.named_parameters():
        how = placement(f"{name}.{kind}")
        part = parameter.chunk(layout.tp, how.dim)[layout.tp_rank] if isinstance(how, Split) else parameter
        new.get_parameter(kind).copy_(part)
