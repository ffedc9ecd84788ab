"""The tokens that each update trains on, as a function of the seed and the index of the sample."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.mixture import turns
from trainer.errors import UserError
from trainer.hashing import MASK, key, mix_

# The version of the order below. It is part of the data's digest, so runs with another order have another digest.
ORDER = 2

_ROUNDS = 6
_DOCUMENTS_PER_GROUP = 64  # per group of an epoch's order, 8 bytes are kept in memory: its first token
_GROUPS_AT_ONCE = 1 << 14
_DOCUMENT_ORDER = 1  # so that documents are permuted in another way than blocks


class Piece(NamedTuple):
    """A part of a document in a sample.

    Attributes:
        document: its number in the corpus, from 0.
        begins: the token of the document at which the part begins.
        tokens: how many tokens of it.
        source: where the part begins in the ids of the corpus.
    """

    document: int
    begins: int
    tokens: int
    source: int


class Samples:
    """The endless sequence of training samples of one corpus.

    Each epoch contains all documents once, in an order of its own. Joined together they are a stream of tokens, which
    is cut into blocks of ``seq_len`` + 1. The last block ends with the stream and may overlap the block before. The
    blocks get a second order, so the parts of a long document do not follow each other. Sample *i* of the lineage is
    block *i* mod *blocks* of epoch *i* div *blocks*. It does not depend on the rank that reads it.

    Args:
        ids: one-dimensional array of token ids.
        seq_len: tokens that a sample predicts.
        seed: decides the order.
        bounds: where documents begin in ``ids``, followed by its length. With None it is one document.

    Raises:
        UserError: the corpus is shorter than one block.
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
            rows[own] = self._read(epoch, self._begin(blocks.numpy()))
        return rows

    def pieces(self, sample: int) -> list[Piece]:
        """The parts of documents that make up ``sample``, in order. Their tokens add up to ``seq_len`` + 1."""
        epoch, index = divmod(sample, self.blocks)
        block = int(permuted(torch.tensor([index]), self.blocks, self._seed, epoch))
        return next(self._pieces(epoch, np.array([self._begin(block)])))

    def _begin(self, block: Any) -> Any:
        """Where a block, or each of several, begins in the epoch's stream. The last one ends with the stream."""
        return np.minimum(block * self._length, len(self._ids) - self._length)

    def _read(self, epoch: int, begins: np.ndarray) -> np.ndarray:
        """The samples of the epoch's stream that begin at ``begins``, [samples, seq_len + 1]."""
        rows = np.empty((len(begins), self._length), self._ids.dtype)
        for row, pieces in zip(rows, self._pieces(epoch, begins), strict=True):
            filled = 0
            for piece in pieces:
                row[filled : filled + piece.tokens] = self._ids[piece.source : piece.source + piece.tokens]
                filled += piece.tokens
        return rows

    def _pieces(self, epoch: int, begins: np.ndarray) -> Iterator[list[Piece]]:
        """For each sample of the epoch's stream that begins at ``begins``: its pieces."""
        starts = self._group_starts(epoch)
        first = np.searchsorted(starts, begins, side="right") - 1
        last = np.searchsorted(starts, begins + self._length - 1, side="right") - 1
        groups = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        documents, sources, lengths = self._documents(epoch, groups)
        for begin, group in zip(begins.tolist(), first.tolist(), strict=True):
            place = int(np.searchsorted(groups, group)) * _DOCUMENTS_PER_GROUP
            skip, filled = begin - int(starts[group]), 0
            pieces: list[Piece] = []
            while filled < self._length:
                length = int(lengths[place])
                if skip < length:
                    tokens = min(length - skip, self._length - filled)
                    pieces.append(Piece(int(documents[place]), skip, tokens, int(sources[place]) + skip))
                    filled += tokens
                skip = max(0, skip - length)
                place += 1
            yield pieces

    def _documents(self, epoch: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents in ``groups`` of the epoch's order: numbers, where they begin in the ids, lengths."""
        places = (groups[:, None] * _DOCUMENTS_PER_GROUP + np.arange(_DOCUMENTS_PER_GROUP)).ravel()
        places = places[places < len(self._bounds) - 1]
        seed = key(self._seed, _DOCUMENT_ORDER)
        documents = permuted(torch.from_numpy(places), len(self._bounds) - 1, seed, epoch).numpy()
        sources = self._bounds[documents]
        return documents, sources, self._bounds[documents + 1] - sources

    def _group_starts(self, epoch: int) -> np.ndarray:
        """Where each group of documents begins in the epoch's stream. Only this needs a pass over all documents."""
        if epoch not in self._starts:
            count = -(-(len(self._bounds) - 1) // _DOCUMENTS_PER_GROUP)
            sums = [np.zeros(1, np.int64)]
            for group in range(0, count, _GROUPS_AT_ONCE):
                _, _, lengths = self._documents(epoch, np.arange(group, min(count, group + _GROUPS_AT_ONCE)))
                sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _DOCUMENTS_PER_GROUP)))
            if len(self._starts) == 2:  # a batch may reach into the next epoch
                del self._starts[min(self._starts)]
            self._starts[epoch] = np.cumsum(np.concatenate(sums))[:-1]
        return self._starts[epoch]


class Stretch(NamedTuple):
    """Samples of a lineage that are taken from the same corpora in the same shares.

    Attributes:
        first: the sample with which it begins.
        corpora: which ones take turns in it, by index.
        parts: the share of each, in whole numbers.
    """

    first: int
    corpora: Sequence[int]
    parts: Sequence[int]


class Mixture:
    """The endless sequence of training samples of a lineage. Its corpora take turns.

    Sample *i* has turn *i* of a sequence that repeats (:func:`trainer.data.mixture.turns`). It is the next sample of
    the corpus whose turn it is. The number of samples that this corpus had before follows from *i*, so there is no
    state to save. Where the data of a lineage changes, another such sequence begins. In it, each corpus goes on behind
    the samples that it had before, in all earlier stretches.

    Args:
        corpora: all with the same ``seq_len``.
        parts: the share of each of the first ``len(parts)`` corpora, in whole numbers.
        later: the stretches that follow, ascending by their first sample.
    """

    def __init__(self, corpora: Sequence[Samples], parts: Sequence[int], later: Sequence[Stretch] = ()) -> None:
        self._corpora = corpora
        stretches = [Stretch(0, range(len(parts)), parts), *later]
        self._firsts = np.array([stretch.first for stretch in stretches])
        self._turns: list[_Turns] = []
        had = np.zeros(len(corpora), np.int64)
        for stretch, following in zip(stretches, [*later, None], strict=True):
            own = _Turns(stretch, had[list(stretch.corpora)])
            self._turns.append(own)
            if following:
                had[list(stretch.corpora)] = own.had(following.first)

    def corpus_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of these samples of the lineage: the index of its corpus, and its index within that corpus."""
        stretches = np.searchsorted(self._firsts, samples, side="right") - 1
        corpus, index = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for stretch in np.unique(stretches).tolist():
            own = stretches == stretch
            corpus[own], index[own] = self._turns[stretch].corpus_of(samples[own])
        return corpus, index

    def pieces(self, sample: int) -> tuple[int, list[Piece]]:
        """The index of the corpus that ``sample`` of the lineage is from, and the parts of documents in it."""
        corpus, index = self.corpus_of(np.array([sample]))
        return int(corpus[0]), self._corpora[int(corpus[0])].pieces(int(index[0]))

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples ``first`` … ``first + count − 1``: two int64 tensors [count, seq_len]."""
        corpus, index = self.corpus_of(np.arange(first, first + count))
        rows = {c: self._corpora[c].rows(index[corpus == c]) for c in np.unique(corpus).tolist()}
        whole = np.empty((count, next(iter(rows.values())).shape[1]), np.int64)
        for c, own in rows.items():
            whole[corpus == c] = own
        return _halves(whole)


class _Turns:
    """The turns of one stretch. ``before``: how many samples each of its corpora had before it."""

    def __init__(self, stretch: Stretch, before: np.ndarray) -> None:
        self._first, self._before = stretch.first, before
        self._corpora = np.array(stretch.corpora, np.int64)
        self._parts = np.array(stretch.parts, np.int64)
        self._turns = turns(stretch.parts)
        self._had = np.empty(len(self._turns), np.int64)  # earlier turns of the same corpus within the period
        for place, part_ in enumerate(stretch.parts):
            self._had[self._turns == place] = np.arange(part_)

    def corpus_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Mixture.corpus_of`, of samples of this stretch."""
        period, turn = np.divmod(samples - self._first, len(self._turns))
        place = self._turns[turn]
        return self._corpora[place], self._before[place] + period * self._parts[place] + self._had[turn]

    def had(self, end: int) -> np.ndarray:
        """How many samples each corpus of the stretch has had before sample ``end`` of the lineage."""
        period, turn = divmod(end - self._first, len(self._turns))
        within = np.bincount(self._turns[:turn], minlength=len(self._parts))
        return self._before + period * self._parts + within


def _halves(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(rows.astype(np.int64, copy=False))
    return tokens[:, :-1], tokens[:, 1:]


def part(first: int, count: int, parts: int, index: int) -> tuple[int, int]:
    """Split ``count`` samples from ``first`` on into ``parts`` parts whose sizes differ by at most one.

    Returns:
        First sample and number of samples of part ``index``.
    """
    each, more = divmod(count, parts)
    return first + index * each + min(index, more), each + (index < more)


def permuted(index: Tensor, size: int, seed: int, epoch: int) -> Tensor:
    """Apply a pseudo-random permutation of range(``size``) to each ``index``, an int64 tensor.

    A Feistel network permutes the next larger range of 4ⁿ. Results outside the range pass through it again until they
    fall inside (Black and Rogaway 2002). There is no table, so a large epoch needs no memory and no start-up time.
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
