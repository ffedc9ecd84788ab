"""The end of one residual branch and the norm before the next: ``LayerNorm(residual + dropout(x))``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.hashing import MASK, ODD, mix_


def keep_mask(shape: torch.Size, p: float, site: int | Tensor, now: Tensor) -> Tensor:
    """The mask of a dropout: False, with probability ``p``, for elements that are dropped.

    It is a hash of seed, step, site, sample index in the lineage, token position in the sequence, and channel. So a
    rank that holds a slice of the activation computes that slice of the mask. The loss is the same in every
    data-parallel and tensor-parallel layout, and after a restart. There is no generator state to save.

    Args:
        shape: [batch, sequence, channel] of this rank's part.
        p: probability that an element is dropped.
        site: number of the dropout within the model.
        now: [key of seed and step, first sample, first position], int64, on the device of the result.

    Returns:
        Boolean tensor of that shape.
    """
    batch, length, channels = shape
    seed_and_step, first_sample, first_position = now.unbind()
    samples = torch.arange(batch, device=now.device) + first_sample
    positions = torch.arange(length, device=now.device) + first_position
    salt = mix_((seed_and_step + site + ODD) & MASK)  # equals key(seed, step, site)
    tokens = mix_((mix_((samples + salt) & MASK)[:, None] + positions) & MASK)
    elements = mix_((tokens[:, :, None] + torch.arange(channels, device=now.device)).bitwise_and_(MASK))
    return elements >= round(p * 2**32)


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Tensor, p: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the branch to the stream, and norm the sum.

    Args:
        x: the result of the branch, [batch, sequence, channel].
        residual: the stream, of the same shape and type.
        weight: of the norm, [channel].
        bias: of the norm, [channel].
        now: as in :func:`keep_mask`.
        site: number of the dropout within the model: an int64 scalar on the CPU.
        p: probability that an element of ``x`` is dropped. 0 in evaluation.
        eps: of the norm.

    Returns:
        The sum, rounded to the type of the stream, and its norm.
    """
    if p:
        x = torch.where(keep_mask(x.shape, p, site, now), x * (1.0 / (1.0 - p)), 0.0)
    total = residual + x
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def supported(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Tensor, p: float, eps: float = 1e-5
) -> str | None:
    """Why the kernel cannot run, or None."""
    return "it is not written yet"


def fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Tensor, p: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`reference` as one kernel."""
    raise NotImplementedError(supported(x, residual, weight, bias, now, site, p, eps))
