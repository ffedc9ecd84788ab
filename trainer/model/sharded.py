"""Tensors that tensor-parallel ranks share. Layers compute with plain tensors, with tensor parallelism as without."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# torch 2.13 has new names for these two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def own(parameter: Tensor) -> Tensor:
    """This rank's part of ``parameter``, as a plain tensor with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def held_alike(whole: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``whole``, which all ranks of ``group`` hold alike and each uses on its part of the sequence.

    What they find for its gradient is summed. Without a group it is left alone.
    """
    return whole if group is None else _applied(_GradientSum, whole, group)


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequences [batch, sequence, hidden] of the parts that the ranks of ``group`` hold."""
    return _applied(_Gather, part, group)


def summed_part(of_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sequence, of the sum over ``group`` of [batch, sequence, hidden]."""
    return _applied(_SumPart, of_rank, group)


def _applied(function: type[torch.autograd.Function], tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = function.apply(tensor, group)
    assert isinstance(result, Tensor)
    return result


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Collectives want their parts one after the other in memory, so the sequence comes first.
    parts = part.transpose(0, 1).contiguous()
    whole = parts.new_empty(parts.shape[0] * group.size(), *parts.shape[1:])
    _all_gather(whole, parts, group=group)
    return whole.transpose(0, 1).contiguous()


def _sum_part(of_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = of_rank.transpose(0, 1).contiguous()
    total = parts.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    _reduce_scatter(total, parts, group=group)
    return total.transpose(0, 1).contiguous()


class _GradientSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    """Each rank finds a part of a sum, the gradient of the whole. The way back adds the parts up and splits the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(part, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum_part(gradients[0], ctx.group), None


class _SumPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_part(of_rank, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], ctx.group), None
