"""The loss over a vocabulary that tensor-parallel ranks may share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Sum(torch.autograd.Function):
    """The sum over a group. Each rank's part has the gradient of the sum, which all ranks hold alike."""

    @staticmethod
    def forward(_ctx: object, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def reference(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The cross-entropy of each token, in nats.

    Args:
        logits: [tokens, columns], this rank's part of the padded vocabulary.
        targets: int64 [tokens], the words of the whole vocabulary that were to be predicted.
        vocab_size: number of real words. Columns beyond them count nothing and get the gradient zero.
        first: the word of the first column.
        group: the ranks that share the vocabulary. None if this rank holds all of it.

    Returns:
        fp32 [tokens], the same on all ranks of ``group``.
    """
    words = max(0, min(logits.shape[1], vocab_size - first))
    real = logits[:, :words].float()
    if group is None:
        return F.cross_entropy(real, targets, reduction="none")
    largest = real.detach().amax(1) if words else real.new_full(targets.shape, -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    shifted = real - largest[:, None]
    own = targets - first
    mine = (own >= 0) & (own < words)
    at_target = shifted.new_zeros(targets.shape)
    if words:
        at_target = torch.where(mine, shifted.gather(1, own.clamp(0, words - 1)[:, None])[:, 0], 0.0)
    sums = _Sum.apply(torch.stack([shifted.exp().sum(1), at_target]), group)
    assert isinstance(sums, Tensor)
    return sums[0].log() - sums[1]


def supported(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> str | None:
    """Why the kernel cannot run, or None."""
    return "it is not written yet"


def fused(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """:func:`reference` as kernels. The gradient takes the place of ``logits`` in memory."""
    raise NotImplementedError(supported(logits, targets, vocab_size, first, group))
