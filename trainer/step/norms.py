"""Norms of gradients, parameters and updates by block of the model, with few kernels and no collective of their own."""

import re
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from trainer import optim
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
        self.blocks = list(dict.fromkeys(map(block_of, engine.names())))
        self._engine = engine
        self._rooms: list[tuple[list[nn.Parameter], list[Tensor]]] = []
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
        return self._summed(_norms(tensors))

    def update_shares(self) -> Tensor:
        """The same of the last update, which must have been applied.

        The op ``adamw`` has handed it out. After an update by torch's AdamW it is computed
        (:func:`trainer.optim.last_update`), block by block, in memory for the shards of the largest block.
        """
        if self._engine.squares is not None:
            return self._summed(self._engine.squares.sqrt().unbind())
        engine, norms = self._engine, []
        self._rooms = self._rooms or _rooms(engine)
        for parameters, room in self._rooms:
            optim.last_update(engine.optimizer, parameters, engine.local, room)
            norms += _norms(room)
        return self._summed(norms)

    def _summed(self, norms: Sequence[Tensor]) -> Tensor:
        """The squares of ``norms``, one for each shard, summed by block."""
        if not norms:
            return torch.zeros(len(self.blocks), dtype=torch.float64)
        self._membership = self._membership.to(norms[0].device)
        return self._membership @ torch.stack(list(norms)).double().square()


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(list(tensors))  # pyright: ignore[reportPrivateImportUsage]  # noqa: SLF001


@torch.no_grad()  # a DTensor then returns its part without a detour through autograd
def _rooms(engine: Engine) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
    """By block: its parameters, and a tensor like this rank's part of each. All blocks share one piece of memory."""
    blocks = [list(shards) for _, shards in groupby(engine.shards, lambda shard: block_of(shard.name))]
    likes = [[engine.local(shard.parameter) for shard in shards] for shards in blocks]
    sizes = [[like.numel() for like in block] for block in likes]
    memory = likes[0][0].new_empty(max(map(sum, sizes))) if likes else torch.empty(0)
    rooms = [
        [flat.view_as(like) for flat, like in zip(memory[: sum(size)].split(size), block, strict=True)]
        for block, size in zip(likes, sizes, strict=True)
    ]
    return [([shard.parameter for shard in shards], room) for shards, room in zip(blocks, rooms, strict=True)]
