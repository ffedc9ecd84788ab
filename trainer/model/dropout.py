"""The place of activations in the run. The masks of dropout depend on it, and not on the rank that computes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.hashing import key


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
    _next: Tensor | None = None

    def values(self) -> list[int]:
        """The values for dropouts, as :meth:`now` has them."""
        return [key(self.seed, self.step), self.first_sample, self.first_position]

    def place(self, now: Tensor) -> None:
        """Hand over :meth:`values` for the next forward pass, on its device. So the pass makes no copy of its own."""
        self._next = now

    def start(self, device: torch.device) -> None:
        """Fix the present values for a forward pass. Dropouts on ``device`` read them until the next pass begins."""
        self._now, self._next = self._tensor(device) if self._next is None else self._next, None

    def now(self, device: torch.device) -> Tensor:
        """The values for dropouts: [key of seed and step, first sample, first position], int64."""
        return self._tensor(device) if self._now is None else self._now

    def _tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values(), device=device)
