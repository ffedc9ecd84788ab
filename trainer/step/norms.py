"""Norms of gradients and parameters by block of the model, with few kernels and no collective of their own."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.parallel.engine import Engine

_BLOCK = re.compile(r"layers\.\d+|[^.]+")


def block_of(name: str) -> str:
    """The block of the model that the parameter ``name`` belongs to, for example ``layers.3`` or ``embed_tokens``."""
    found = _BLOCK.match(name)
    assert found
    return found[0]


class BlockNorms:
    """Squared l2 norms, one per block, as shares: the shares of all ranks add up to the whole.

    In OPT-175B the logging of norms took about a second of each step, because metaseq went tensor by tensor. Here it
    takes one pass over all tensors and one matrix product. The matrix says how much each tensor counts in each block.
    The all-reduce that the step has anyway adds the shares up.

    Args:
        engine: for the names of parameters and the shards of this rank. A shard that several ranks hold counts once.
    """

    def __init__(self, engine: Engine) -> None:
        self.blocks = list(dict.fromkeys(block_of(name) for name, _ in engine.model.named_parameters()))
        membership = torch.zeros(len(self.blocks), len(engine.shards), dtype=torch.float64)
        for column, shard in enumerate(engine.shards):
            membership[self.blocks.index(block_of(shard.name)), column] = 1 / shard.copies
        self._membership = membership

    def shares(self, tensors: Sequence[Tensor]) -> Tensor:
        """The shares of this rank.

        Args:
            tensors: one for each of the engine's shards, in their order.

        Returns:
            A float64 tensor [blocks].
        """
        if not tensors:
            return torch.zeros(len(self.blocks), dtype=torch.float64)
        self._membership = self._membership.to(tensors[0].device)
        norms = torch.stack(torch._foreach_norm(list(tensors)))  # pyright: ignore[reportPrivateImportUsage]  # noqa: SLF001
        return self._membership @ norms.double().square()
