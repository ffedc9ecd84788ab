"""Dropout with masks that depend on the masked element only, and not on the rank that computes them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.hashing import key
from trainer.kernels import dropout_add_layer_norm


@dataclass(slots=True)
class DropoutClock:
    """The place of this rank's activations in the run. Set once per micro-batch; all dropouts of the model read it.

    Compiled code reads it as a tensor. A plain number would become a constant, and each step would be compiled again.

    Attributes:
        seed: the seed of the run.
        step: the current update, from 1.
        first_sample: index in the lineage of the first sequence of this micro-batch.
        first_position: position of the first token of this rank's shard of the sequence.
    """

    seed: int = 0
    step: int = 0
    first_sample: int = 0
    first_position: int = 0
    _now: Tensor | None = None

    def start(self, device: torch.device) -> None:
        """Fix the present values for a forward pass. Dropouts on ``device`` read them until the next pass begins."""
        self._now = self._tensor(device)

    def now(self, device: torch.device) -> Tensor:
        """The values for dropouts: [key of seed and step, first sample, first position], int64."""
        return self._tensor(device) if self._now is None else self._now

    def _tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([key(self.seed, self.step), self.first_sample, self.first_position], device=device)


def keep_mask(shape: torch.Size, p: float, site: int | Tensor, clock: DropoutClock, device: torch.device) -> Tensor:
    """:func:`trainer.kernels.dropout_add_layer_norm.keep_mask` at the place that ``clock`` tells."""
    return dropout_add_layer_norm.keep_mask(shape, p, site, clock.now(device))


class Dropout(nn.Module):
    """Dropout of hidden states [batch, sequence, channel]; see :func:`keep_mask`.

    Attention probabilities have no dropout. The released OPT models use 0 there, and a mask of [sequence, sequence] per
    head would prevent fused attention kernels.
    """

    def __init__(self, p: float, site: int, clock: DropoutClock) -> None:
        super().__init__()
        self.p = p
        # A tensor, so that compiled code does not take it as a constant. No buffer, because it is not model state.
        self.site = torch.tensor(site, device="cpu")
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        """In training, set a share ``p`` of ``x`` to zero and scale the rest by 1 / (1 − p)."""
        if self.p == 0.0 or not self.training:
            return x
        keep = keep_mask(x.shape, self.p, self.site, self.clock, x.device)
        return x * (keep.to(x.dtype) / (1.0 - self.p))
