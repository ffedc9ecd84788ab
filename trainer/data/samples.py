"""Which tokens each update trains on: a function of the seed and the sample's index alone."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.data.mixture import turns
from trainer.errors import UserError
from trainer.hashing import MASK, key, mix_

# Of the order below: a new number tells runs apart that went through the same data in another way.
ORDER = 2

_ROUNDS = 6
_DOCUMENTS_PER_GROUP = 64  # of an epoch's order, the first token of each group is kept in memory: 8 bytes
_GROUPS_AT_ONCE = 1 << 14
_DOCUMENT_ORDER = 1  # sets the permutation of documents apart from that of blocks


class Samples:
    """The endless sequence of training samples of one corpus.

    Each epoch goes through all documents once, in an order of its own. One after the other they are a stream of
    tokens, which is cut into blocks of ``seq_len`` + 1; the last block ends with the stream and may overlap the one
    before. Sample *i* of the lineage is block *i* mod *blocks*, in a second order, of epoch *i* div *blocks*: so the
    parts of a long document do not follow each other. Which rank reads it has no influence.

    Args:
        ids: one-dimensional array of token ids.
        seq_len: tokens that a sample predicts.
        seed: decides the order.
        bounds: where documents begin in ``ids``, and at last its length; None takes it for one document.

    Raises:
        UserError: there is not one whole block.
    """

    def __init__(self, ids: np.ndarray, seq_len: int, seed: int, bounds: np.ndarray | None = None) -> None:
        self._length = seq_len + 1
        if len(ids) < self._length:
            raise UserError(
                f"the data has {len(ids)} tokens, less than one sample of {self._length}: give more --data."
            )
        self.blocks = -(-len(ids) // self._length)
        self._ids = ids
        self._bounds = np.array([0, len(ids)]) if bounds is None else bounds
        self._seed = seed
        self._starts: dict[int, np.ndarray] = {}

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples ``first`` … ``first + count − 1``: two int64 tensors [count, seq_len]."""
        return _halves(self.rows(np.arange(first, first + count)))

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The token ids of these samples, [samples, seq_len + 1]."""
        epochs = samples // self.blocks
        rows = np.empty((len(samples), self._length), self._ids.dtype)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            blocks = permuted(torch.from_numpy(samples[own] % self.blocks), self.blocks, self._seed, epoch)
            rows[own] = self._read(epoch, np.minimum(blocks.numpy() * self._length, len(self._ids) - self._length))
        return rows

    def _read(self, epoch: int, begins: np.ndarray) -> np.ndarray:
        """As many tokens as a sample has of the epoch's stream, from each of ``begins`` on."""
        starts = self._group_starts(epoch)
        first = np.searchsorted(starts, begins, side="right") - 1
        last = np.searchsorted(starts, begins + self._length - 1, side="right") - 1
        groups = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        sources, lengths = self._documents(epoch, groups)
        rows = np.empty((len(begins), self._length), self._ids.dtype)
        for row, begin, group in zip(rows, begins.tolist(), first.tolist(), strict=True):
            document = int(np.searchsorted(groups, group)) * _DOCUMENTS_PER_GROUP
            skip, filled = begin - int(starts[group]), 0
            while filled < self._length:
                length = int(lengths[document])
                if skip < length:
                    source = int(sources[document]) + skip
                    piece = self._ids[source : source + min(length - skip, self._length - filled)]
                    row[filled : filled + len(piece)] = piece
                    filled += len(piece)
                skip = max(0, skip - length)
                document += 1
        return rows

    def _documents(self, epoch: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the file the documents of ``groups`` of the epoch's order begin, and how long they are."""
        places = (groups[:, None] * _DOCUMENTS_PER_GROUP + np.arange(_DOCUMENTS_PER_GROUP)).ravel()
        places = places[places < len(self._bounds) - 1]
        seed = key(self._seed, _DOCUMENT_ORDER)
        documents = permuted(torch.from_numpy(places), len(self._bounds) - 1, seed, epoch).numpy()
        sources = self._bounds[documents]
        return sources, self._bounds[documents + 1] - sources

    def _group_starts(self, epoch: int) -> np.ndarray:
        """Where in the epoch's stream each group of documents begins: the one thing that takes a pass over all."""
        if epoch not in self._starts:
            count = -(-(len(self._bounds) - 1) // _DOCUMENTS_PER_GROUP)
            sums = [np.zeros(1, np.int64)]
            for group in range(0, count, _GROUPS_AT_ONCE):
                _, lengths = self._documents(epoch, np.arange(group, min(count, group + _GROUPS_AT_ONCE)))
                sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _DOCUMENTS_PER_GROUP)))
            if len(self._starts) == 2:  # a batch may reach into the next epoch
                del self._starts[min(self._starts)]
            self._starts[epoch] = np.cumsum(np.concatenate(sums))[:-1]
        return self._starts[epoch]


class Mixture:
    """The endless sequence of training samples of a lineage: those of its corpora, taken by turns.

    Sample *i* has turn *i* of a sequence that repeats (:func:`trainer.data.mixture.turns`); it is the next sample of
    the corpus whose turn it is. How many that corpus had before follows from *i* alone, so there is no state to save.

    Args:
        corpora: of one ``seq_len``.
        parts: whole numbers: the share of each.
    """

    def __init__(self, corpora: Sequence[Samples], parts: Sequence[int]) -> None:
        self._corpora = corpora
        self._parts = np.array(parts, np.int64)
        self._turns = turns(parts)
        self._had = np.empty(len(self._turns), np.int64)  # by its corpus, within the period and before this turn
        for corpus, part_ in enumerate(parts):
            self._had[self._turns == corpus] = np.arange(part_)

    def corpus_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each of these samples of the lineage: the index of its corpus, and which sample of that it is."""
        period, turn = np.divmod(samples, len(self._turns))
        corpus = self._turns[turn]
        return corpus, period * self._parts[corpus] + self._had[turn]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples ``first`` … ``first + count − 1``: two int64 tensors [count, seq_len]."""
        corpus, index = self.corpus_of(np.arange(first, first + count))
        rows = {c: self._corpora[c].rows(index[corpus == c]) for c in np.unique(corpus).tolist()}
        whole = np.empty((count, next(iter(rows.values())).shape[1]), np.int64)
        for c, own in rows.items():
            whole[corpus == c] = own
        return _halves(whole)


def _halves(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(rows.astype(np.int64, copy=False))
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


def permuted(index: Tensor, size: int, seed: int, epoch: int) -> Tensor:
    """Where a pseudo-random permutation of range(``size``) takes each ``index``, an int64 tensor.

    A Feistel network permutes the next larger range of 4ⁿ, and results outside the range are sent through again until
    they fall inside (Black and Rogaway 2002). No table: an epoch of a trillion tokens needs no memory and no time.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    result = _network(index, half, keys)
    while len(outside := (result >= size).nonzero().squeeze(1)):
        result[outside] = _network(result[outside], half, keys)
    return result


def _network(index: Tensor, half: int, keys: Sequence[int]) -> Tensor:
    low = (1 << half) - 1
    left, right = index >> half, index & low
    for round_key in keys:
        left, right = right, mix_((right + round_key) & MASK).bitwise_and_(low).bitwise_xor_(left)
    return left << half | right


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(key(seed, epoch, i) for i in range(_ROUNDS))
