"""The first product of a feed-forward layer with its bias and ReLU."""

import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x · weightᵀ + bias)``.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs].
        bias: [outputs].

    Returns:
        [..., outputs].
    """
    return F.relu(F.linear(x, weight, bias))


def supported(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel cannot run, or None."""
    return "it is not written yet"


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`reference` with one kernel for the product, and one for the two smaller gradients."""
    raise NotImplementedError(supported(x, weight, bias))
