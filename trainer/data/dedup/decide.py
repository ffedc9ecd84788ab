"""Which documents stay: of each group of copies the first one, and no document that is in a test text.

A document is compared with documents that stay. So chains of near copies do not eat each other, and each group keeps
one. Candidates by MinHash are compared exactly: an estimate from 128 values would miss half of the pairs at 0.95.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from trainer.data.dedup.words import COMMON_RUN, Hashes


class Why(StrEnum):
    """Why a document goes."""

    EXACT = "exact"  # the same words
    NEAR = "near"  # at least the Jaccard index that was given
    CONTAMINATED = "contaminated"  # of a text that must not be trained on


@dataclass(frozen=True, slots=True)
class Removal:
    """A document that goes, the one because of which it goes, and their Jaccard index if it was computed."""

    document: int
    other: int
    why: Why
    jaccard: float | None
    words: int | None = None  # that they share in a row, at least


@dataclass(frozen=True, kw_only=True)
class Documents:
    """All documents by number: test texts first, then documents of older corpora, then those of the input.

    Attributes:
        tests: how many test texts there are.
        known: how many documents of older corpora follow them.
        digests: of the words of each, ``[documents, 32]``.
        sizes: how many different runs each has, ``[documents]``.
        bands: as in ``Sketches``, ``[documents, BANDS]``.
        shared: the test text with which each shares a run of 13 words, −1 for none, ``[documents]``.
    """

    tests: int
    known: int
    digests: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    bands: Hashes
    shared: NDArray[np.int64]


def removals(documents: Documents, threshold: float, jaccard: Callable[[int, int], float]) -> Iterator[Removal]:
    """The documents of the input that go, in order.

    Args:
        documents: what is known of each.
        threshold: the Jaccard index from which on two documents are near copies.
        jaccard: computes the Jaccard index of two documents.
    """
    groups = _groups(documents.bands)
    seen: dict[bytes, int] = {}
    members: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in range(groups.shape[1])]
    for number, digest in enumerate(documents.digests):
        removal = None
        if number >= documents.tests + documents.known:
            removal = _removal(documents, number, seen.get(digest.tobytes()), groups, members, threshold, jaccard)
        if removal is not None:
            yield removal
            continue
        seen.setdefault(digest.tobytes(), number)
        for band, group in enumerate(groups[number]):
            if group >= 0:
                members[band][int(group)].append(number)


def _removal(
    documents: Documents,
    number: int,
    same: int | None,
    groups: NDArray[np.int64],
    members: list[defaultdict[int, list[int]]],
    threshold: float,
    jaccard: Callable[[int, int], float],
) -> Removal | None:
    test = int(documents.shared[number])
    if test >= 0:
        return Removal(number, test, Why.CONTAMINATED, None, COMMON_RUN)
    if same is not None:
        return Removal(number, same, Why.CONTAMINATED if same < documents.tests else Why.EXACT, 1.0)
    found = {other for band, group in enumerate(groups[number]) if group >= 0 for other in members[band][int(group)]}
    size = documents.sizes[number]
    for other in sorted(found):
        less, more = sorted((size, documents.sizes[other]))
        if less < threshold * more:
            continue  # even if all runs of the shorter one are in the longer one
        index = jaccard(number, other)
        if index >= threshold:
            return Removal(number, other, Why.CONTAMINATED if other < documents.tests else Why.NEAR, index)
    return None


def _groups(bands: Hashes) -> NDArray[np.int64]:
    """By document and band: the number of the group with the same value; −1 where no other document has it."""
    groups = np.full(bands.shape, -1, np.int64)
    for band in range(bands.shape[1]):
        _, place, count = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        groups[:, band] = np.where(count[place] > 1, place, -1)
    return groups
