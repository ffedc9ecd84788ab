"""Which tokens each update trains on: a function of the seed and the sample's index alone."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.hashing import MASK, key, mix

_ROUNDS = 6


class Samples:
    """The endless sequence of training samples of a lineage.

    The token stream is cut into blocks of ``seq_len`` + 1. Each epoch goes through all of them once, in an order of its
    own. Sample *i* of the lineage is block *i* mod *blocks* of the order of epoch *i* div *blocks*; which rank reads it
    has no influence.

    Args:
        ids: one-dimensional array of token ids.
        seq_len: tokens that a sample predicts.
        seed: decides the order.

    Raises:
        UserError: there is not one whole block.
    """

    def __init__(self, ids: np.ndarray, seq_len: int, seed: int) -> None:
        self.blocks = len(ids) // (seq_len + 1)
        if self.blocks == 0:
            raise UserError(f"the data has {len(ids)} tokens, less than one sample of {seq_len + 1}: give more --data.")
        self._ids = ids[: self.blocks * (seq_len + 1)].reshape(self.blocks, seq_len + 1)
        self._seed = seed

    def block(self, sample: int) -> int:
        """Which block sample number ``sample`` of the lineage is."""
        epoch, index = divmod(sample, self.blocks)
        return permuted(index, self.blocks, self._seed, epoch)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples ``first`` … ``first + count − 1``: two int64 tensors [count, seq_len]."""
        rows = self._ids[[self.block(first + i) for i in range(count)]]
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def next_sample(position: int, batch: int, skips: Iterable[tuple[int, int]]) -> int:
    """Where the next update begins: at ``position``, or behind what is left out from there on.

    An update never trains on a sample of a window, not even where the size of batches was changed at a checkpoint that
    is no multiple of the new one.

    Args:
        position: index of the sample after the last one trained on. Windows that end before it change nothing.
        batch: samples in a batch.
        skips: windows (first, last) of batches that are left out, 1 being the first; they may overlap.
    """
    for first, last in sorted(skips):
        if (first - 1) * batch < position + batch and position < last * batch:
            position = last * batch
    return position


def part(first: int, count: int, parts: int, index: int) -> tuple[int, int]:
    """Part ``index`` of ``count`` samples from ``first`` on, dealt out in order: parts differ by one at most.

    Returns:
        Its first sample and how many it has.
    """
    each, more = divmod(count, parts)
    return first + index * each + min(index, more), each + (index < more)


def permuted(index: int, size: int, seed: int, epoch: int) -> int:
    """Where a pseudo-random permutation of range(``size``) takes ``index``.

    A Feistel network permutes the next larger range of 4ⁿ, and results outside the range are sent through again until
    they fall inside (Black and Rogaway 2002). No table: an epoch of a trillion tokens needs no memory and no time.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_key in _round_keys(seed, epoch):
            left, right = right, left ^ (mix((right + round_key) & MASK) & low)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=2)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(key(seed, epoch, i) for i in range(_ROUNDS))
