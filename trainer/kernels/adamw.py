"""AdamW in one pass over gradient, master weight and moments."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def reference(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    """Update ``masters``, moments and ``copies`` in place. The order of operations is that of torch's AdamW.

    Args:
        gradients: of each master.
        masters: fp32 weights.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        copies: of the masters in bf16 or fp16, written from the new masters. None if there are none.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        step: number of this update, from 1.
        factor: fp32 tensor of one element, by which gradients are multiplied: clipping, and what undoes the loss scale.

    Returns:
        fp32 [number of masters]: the sum of squares of what was added to each, weight decay included.
    """
    bias_1, bias_2 = (1 - beta**step for beta in betas)
    squares: list[Tensor] = []
    for i, (gradient, master, mean, square) in enumerate(zip(gradients, masters, exp_avgs, exp_avg_sqs, strict=True)):
        scaled, before = gradient.float() * factor, master.clone()
        master.mul_(1 - lr * weight_decay)
        mean.lerp_(scaled, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        master.addcdiv_(mean, (square.sqrt() / math.sqrt(bias_2)).add_(eps), value=-lr / bias_1)
        if copies is not None:
            copies[i].copy_(master)
        squares.append((master - before).square().sum())
    return torch.stack(squares) if squares else factor.new_zeros(0)


def supported(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> str | None:
    """Why the kernel cannot run, or None."""
    return "it is not written yet"


def fused(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    """:func:`reference` as one kernel, launched once for many tensors."""
    raise NotImplementedError("it is not written yet")
