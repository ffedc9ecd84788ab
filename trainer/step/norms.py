"""Norms of gradients and parameters by block of the model, in few kernels and without a collective of their own."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.parallel.engine import Engine

_BLOCK = re.compile(r"layers\.\d+|[^.]+")


def block_of(name: str) -> str:
    """The block of the model that the parameter ``name`` belongs to: ``layers.3``, ``embed_tokens``, …."""
    found = _BLOCK.match(name)
    assert found
    return found[0]


class BlockNorms:
    """Squares of l2 norms, one for each block, as shares: those of all ranks add up to the whole.

    metaseq's logging of norms took about a second of each step of OPT-175B, tensor by tensor. Here it is one pass over
    all tensors and one product with a matrix that says which tensor counts for which block; the sum over ranks is left
    to the collective that each step has anyway.

    Args:
        engine: for the names of all parameters, and for what this rank cares for. What several ranks hold alike counts
            once.
    """

    def __init__(self, engine: Engine) -> None:
        self.blocks = list(dict.fromkeys(block_of(name) for name, _ in engine.model.named_parameters()))
        membership = torch.zeros(len(self.blocks), len(engine.shards), dtype=torch.float64)
        for column, shard in enumerate(engine.shards):
            membership[self.blocks.index(block_of(shard.name)), column] = 1 / shard.copies
        self._membership = membership

    def shares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of ``tensors``, which belong to the engine's shards one by one: a float64 tensor [blocks]."""
        if not tensors:
            return torch.zeros(len(self.blocks), dtype=torch.float64)
        self._membership = self._membership.to(tensors[0].device)
        norms = torch.stack(torch._foreach_norm(list(tensors)))  # pyright: ignore[reportPrivateImportUsage]  # noqa: SLF001
        return self._membership @ norms.double().square()
