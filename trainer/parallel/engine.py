"""The interface between a training step and the engine that spreads the model over ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import optim
from trainer.model.opt import OPT, DecoderLayer
from trainer.parallel.mesh import Layout


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a parameter that this rank updates.

    Attributes:
        name: of the parameter.
        parameter: as the model holds it on this rank.
        copies: number of ranks that hold the same part.
    """

    name: str
    parameter: nn.Parameter
    copies: int


class Engine(ABC):
    """A model that is spread over the mesh, and its optimizer.

    Attributes:
        model: steps set its clock. Checkpoints use the names of its parameters.
        optimizer: over the shards of this rank.
        layout: the mesh.
        shards: of this rank.
        comparable: whether ranks hold something in common that checksums can compare.
        squares: for each shard, the sum of squares of what the last update added to it. None where AdamW is torch's,
            which does not tell.
        before_update: what must be called before an update changes the state, because something may still read it.
    """

    model: OPT
    optimizer: torch.optim.Optimizer
    layout: Layout
    shards: list[Shard]
    comparable = True
    squares: Tensor | None = None
    before_update: Callable[[], None] | None = None
    _fused_update: optim.FusedUpdate | None = None

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """The context for forward and backward pass of one micro-batch. The ``last`` one sums gradients over ranks."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Run the forward pass.

        Args:
            inputs: token ids, [batch, sequence].
            targets: the tokens to predict, the same shape.

        Returns:
            Two sums over all tokens: the loss in nats, and the l2 norm of the activations. The loss is the same on all
            ranks of a tensor-parallel group. The norm is the share of this rank.
        """

    @abstractmethod
    def first_position(self, seq_len: int) -> int:
        """Position in the sequence of the first token that this rank holds between layers."""

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or of its gradient: a plain tensor that shares the memory."""

    def gather(self, layer: DecoderLayer) -> None:  # noqa: ARG002
        """Gather the whole parameters of ``layer``, or of this rank's heads, if they are not there. Its pass follows.

        All ranks gather them then. So a rank may call this alone.
        """
        return  # an engine whose ranks hold them anyway has nothing to do

    def whole_sequence(self, x: Tensor) -> Tensor:
        """The whole sequence [batch, sequence, hidden] of the part of it that this rank holds between layers."""
        return x

    @abstractmethod
    def state(self) -> dict[str, dict[str, Any]]:
        """The content of a checkpoint: ``model`` and ``optimizer``, by parameter name, as DTensors and plain scalars.

        All engines use the same names and global shapes, so each can load what another has saved.
        """

    def names(self) -> list[str]:
        """The names of all parameters of the whole model, in their order: the same on all ranks."""
        return [name for name, _ in self.model.named_parameters()]

    def gradients(self) -> list[Tensor]:
        """This rank's part of the gradient of each shard, in their order."""
        return [self.local(s.parameter.grad) for s in self.shards if s.parameter.grad is not None]

    def parameters(self) -> list[Tensor]:
        """This rank's part of each shard, in their order."""
        with torch.no_grad():  # a DTensor then returns its part without a detour through autograd
            return [self.local(s.parameter) for s in self.shards]

    def size(self) -> int:
        """Number of parameters of the whole model."""
        return sum(tensor.numel() for tensor in self.state()["model"].values())

    def update(self, gnorm: float | Tensor, lr: float, divisor: float, *, unless: Tensor | None = None) -> None:
        """Clip the gradients and update the weights. The host does not wait for the device.

        Args:
            gnorm: global norm of the gradients of the mean loss; a scalar on the device, or a number.
            lr: learning rate of this update.
            divisor: what the gradients in the parameters are larger by: tokens · loss scale / data-parallel ranks.
            unless: a boolean scalar. Where it is true, weights, moments and step counts stay as they are.
        """
        if self.before_update:
            self.before_update()
        optim.set_learning_rate(self.optimizer, lr)
        factor = optim.gradient_factor(self.optimizer, gnorm, divisor)
        if self.model.ops.ran["adamw"] == "fused":
            parameters = [shard.parameter for shard in self.shards]
            self._fused_update = self._fused_update or optim.FusedUpdate(
                self.optimizer, parameters, self.local, self.model.ops.adamw
            )
            self.squares = self._fused_update(factor, unless)
        else:
            self.squares = None
            optim.update(self.optimizer, factor, unless=unless)
