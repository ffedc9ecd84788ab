"""Dropout whose mask depends on what is masked, not on who masks it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.hashing import MASK, ODD, key, mix_


@dataclass(slots=True)
class Clock:
    """Where in the run this rank's activations are. Set once per micro-batch; every dropout of the model reads it.

    Compiled code reads it as a tensor: a number would be taken for a constant, and each step be compiled anew.

    Attributes:
        seed: the run's seed.
        step: the update being computed, from 1.
        first_sample: index in the lineage of the first sequence of this micro-batch.
        first_position: position of the first token of this rank's shard of the sequence.
    """

    seed: int = 0
    step: int = 0
    first_sample: int = 0
    first_position: int = 0
    _now: Tensor | None = None

    def start(self, device: torch.device) -> None:
        """A forward pass begins: what is set now is what dropouts on ``device`` read, until the next one begins."""
        self._now = self._tensor(device)

    def now(self, device: torch.device) -> Tensor:
        """[key of seed and step, first sample, first position], int64."""
        return self._tensor(device) if self._now is None else self._now

    def _tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([key(self.seed, self.step), self.first_sample, self.first_position], device=device)


def keep_mask(shape: torch.Size, p: float, site: int | Tensor, clock: Clock, device: torch.device) -> Tensor:
    """Which elements of an activation survive: False with probability ``p``.

    A pure function of (seed, step, site, index of the sample in the lineage, position of the token in the sequence,
    channel), by a counter-based hash: a rank that holds a slice of the activation computes that slice of the mask. So
    the loss is the same for every data-parallel and tensor-parallel layout and across restarts, without any generator
    state to save.

    Args:
        shape: [batch, sequence, channel] of this rank's part.
        p: probability of dropping.
        site: number of the dropout within the model.
        clock: where that part lies.
        device: where to compute.

    Returns:
        Boolean tensor of that shape.
    """
    batch, length, channels = shape
    seed_and_step, first_sample, first_position = clock.now(device).unbind()
    samples = torch.arange(batch, device=device) + first_sample
    positions = torch.arange(length, device=device) + first_position
    salt = mix_((seed_and_step + site + ODD) & MASK)  # that is key(seed, step, site)
    tokens = mix_((mix_((samples + salt) & MASK)[:, None] + positions) & MASK)
    elements = mix_((tokens[:, :, None] + torch.arange(channels, device=device)).bitwise_and_(MASK))
    return elements >= round(p * 2**32)


class Dropout(nn.Module):
    """Dropout of hidden states [batch, sequence, channel]; see :func:`keep_mask`.

    There is none on attention probabilities: the released OPT models have 0 there, and a mask of [sequence, sequence]
    per head would rule out fused attention kernels.
    """

    def __init__(self, p: float, site: int, clock: Clock) -> None:
        super().__init__()
        self.p = p
        # A tensor for the same reason as the clock's; and not a buffer, for it is no part of the model's state.
        self.site = torch.tensor(site, device="cpu")
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share ``p`` of ``x`` and scale the rest by 1 / (1 − p), in training."""
        if self.p == 0.0 or not self.training:
            return x
        keep = keep_mask(x.shape, self.p, self.site, self.clock, x.device)
        return x * (keep.to(x.dtype) / (1.0 - self.p))
