"""Causal self-attention."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.fused import BranchEnd
from trainer.model.sharded import gathered, own
from trainer.recipes import ModelConfig


class SelfAttention(nn.Module):
    """Causal multi-head attention. The heads may be a tensor-parallel shard; their number follows from projections.

    The three input projections are parameters of their own, as in the released models, and one product.

    Args:
        config: for the sizes and the dropout of attention probabilities.

    Attributes:
        group: the tensor-parallel ranks, each with its part of the sequence and of the heads. None if there is one.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = BranchEnd(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] → the same."""

        def heads(y: Tensor) -> Tensor:  # [batch, heads, sequence, head_dim]
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        if self.group is not None:
            x = gathered(x, self.group)
        inputs = (self.q_proj, self.k_proj, self.v_proj)
        weights, biases = (own(linear.weight) for linear in inputs), (own(linear.bias) for linear in inputs)
        queries, keys, values = _Projections.apply(x, *weights, *biases)
        # This function scales the queries by head_dim^-0.5 by default.
        attended = F.scaled_dot_product_attention(
            heads(queries),
            heads(keys),
            heads(values),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _Projections(torch.autograd.Function):
    """Queries, keys and values of [batch, sequence, hidden], as one product.

    In the backward pass the three gradients are not joined for one product, because that would copy them. Instead, the
    products add to one another what they give to the gradient of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[:3], parameters[3:]
        ctx.save_for_backward(x, *weights)
        joined = F.linear(x, torch.cat(weights), torch.cat(biases))
        return joined.split([len(weight) for weight in weights], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        rows, flat = x.flatten(0, 1), [gradient.flatten(0, 1) for gradient in gradients]
        of_x = flat[0] @ weights[0]
        for gradient, weight in zip(flat[1:], weights[1:], strict=True):
            of_x = of_x.addmm_(gradient, weight)
        return of_x.view_as(x), *(g.T @ rows for g in flat), *(g.sum(0) for g in flat)
