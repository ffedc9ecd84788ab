"""What the steps of training need of whatever spreads the model over ranks."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import optim
from trainer.model.opt import OPT
from trainer.parallel.mesh import Layout


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a parameter that this rank has in its care, with the number of ranks that hold the very same part."""

    name: str
    parameter: nn.Parameter
    copies: int


class Engine(ABC):
    """A model spread over the mesh, and its optimizer.

    Attributes:
        model: whose clock the steps set, and whose names of parameters are those of checkpoints.
        optimizer: over this rank's shards.
        layout: the mesh.
        shards: what this rank cares for.
        comparable: whether ranks hold anything alike that checksums can compare.
    """

    model: OPT
    optimizer: torch.optim.Optimizer
    layout: Layout
    shards: list[Shard]
    comparable = True

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Where forward and backward pass of a micro-batch belong; gradients are summed over ranks in the ``last``."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass.

        Args:
            inputs: token ids, [batch, sequence].
            targets: the tokens to predict, the same shape.

        Returns:
            The sum of the loss over all tokens, in nats, the same on all ranks of a tensor-parallel group (perhaps as a
            DTensor); and this rank's share of the sum over the group's tokens of the norm of activations.
        """

    @abstractmethod
    def first_position(self, seq_len: int) -> int:
        """Position in the sequence of the first token that this rank has between layers."""

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or of its gradient, as a plain tensor that shares its memory."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds: ``model`` and ``optimizer``, by parameter name, as DTensors and plain scalars.

        Every engine tells the same names and whole shapes, so that what one saved, another can load.
        """

    def gradients(self) -> list[Tensor]:
        """This rank's part of the gradient of each shard, in their order."""
        return [self.local(s.parameter.grad) for s in self.shards if s.parameter.grad is not None]

    def parameters(self) -> list[Tensor]:
        """This rank's part of each shard, in their order."""
        with torch.no_grad():  # a DTensor then hands out its part without a detour through autograd
            return [self.local(s.parameter) for s in self.shards]

    def size(self) -> int:
        """Parameters of the whole model."""
        return sum(tensor.numel() for tensor in self.state()["model"].values())

    def update(self, gnorm: float, lr: float, loss_scale: float | None = None, *, apply: bool = True) -> None:
        """Clip the gradients, whose global norm is ``gnorm`` once unscaled, and ``apply`` them; see :mod:`optim`."""
        optim.set_learning_rate(self.optimizer, lr)
        if apply:
            optim.update(self.optimizer, self.gradients(), gnorm, loss_scale)
