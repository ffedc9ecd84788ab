"""Modules that hold the parameters of an op, under the names of the released models, and call it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.kernels import bias_relu, dropout_add_layer_norm
from trainer.kernels.choice import Ops
from trainer.model.dropout import DropoutClock
from trainer.model.sharded import gathered, held_alike, own, summed_part

LAYER_NORM_EPS = 1e-5


class ResidualNorm(nn.LayerNorm):
    """The end of a residual branch, dropout and addition, and the norm that follows.

    Args:
        size: number of channels.
        p: probability of dropout.
        site: number of the dropout within the model.
        clock: the place of activations in the run.

    Attributes:
        op: of :mod:`trainer.kernels.dropout_add_layer_norm`.
        group: the tensor-parallel ranks, each with its part of the sequence. None if there is one.
    """

    op: Callable[..., Any]
    group: dist.ProcessGroup | None = None

    def __init__(self, size: int, p: float, site: int, clock: DropoutClock) -> None:
        super().__init__(size, eps=LAYER_NORM_EPS)
        self.p = p
        # A tensor, so that compiled code does not take it as a constant. No buffer, because it is not model state.
        self.site = torch.tensor(site, device="cpu")
        self.clock = clock
        self.op = dropout_add_layer_norm.reference

    def forward(self, stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the stream with the branch added to it, and its norm: [batch, sequence, channel] each."""
        p = self.p if self.training else 0.0
        weight, bias = (held_alike(own(parameter), self.group) for parameter in (self.weight, self.bias))
        return self.op(branch, stream, weight, bias, self.clock.now(stream.device), self.site, p, self.eps)


class FirstNorm(nn.LayerNorm):
    """The norm at the start of the model, where no branch ends yet. ``group`` is as in :class:`ResidualNorm`."""

    group: dist.ProcessGroup | None = None

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name of the base class
        """[batch, sequence, channel] → the same."""
        weight, bias = (held_alike(own(parameter), self.group) for parameter in (self.weight, self.bias))
        return nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class LinearReLU(nn.Linear):
    """A linear layer with ReLU.

    Attributes:
        op: of :mod:`trainer.kernels.bias_relu`.
        group: the tensor-parallel ranks, each with its part of the sequence and of the outputs. None if there is one.
    """

    op: Callable[..., Any]
    group: dist.ProcessGroup | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.op = bias_relu.reference

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name of the base class
        """[batch, sequence, inputs] → [batch, sequence, outputs], of which a tensor-parallel rank gets its part."""
        whole = input if self.group is None else gathered(input, self.group)
        return self.op(whole, own(self.weight), own(self.bias))


class BranchEnd(nn.Linear):
    """The linear layer at the end of a branch.

    Attributes:
        group: the tensor-parallel ranks, each with its part of the inputs. None if there is one.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name of the base class
        """[batch, sequence, inputs] → [batch, sequence, outputs], of which a rank gets its part of the sequence."""
        weight, bias = own(self.weight), own(self.bias)
        if self.group is None:
            return nn.functional.linear(input, weight, bias)
        return summed_part(nn.functional.linear(input, weight), self.group) + held_alike(bias, self.group)


def use(model: nn.Module, ops: Ops) -> None:
    """Let all modules inside ``model`` call these ops."""
    for module in model.modules():
        if isinstance(module, ResidualNorm):
            module.op = ops.dropout_add_layer_norm
        elif isinstance(module, LinearReLU):
            module.op = ops.bias_relu
