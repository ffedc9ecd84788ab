"""Which documents stay: of each group of copies the first one, and no document that is in a test text.

A document is compared with documents that stay. So chains of near copies do not eat each other, and each group keeps
one. Candidates by MinHash are compared exactly: an estimate from 128 values would miss half of the pairs at 0.95.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from trainer.data.dedup.candidates import Candidates
from trainer.data.dedup.words import COMMON_RUN


class Why(StrEnum):
    """Why a document goes."""

    EXACT = "exact"  # the same words
    NEAR = "near"  # at least the Jaccard index that was given
    CONTAMINATED = "contaminated"  # of a text that must not be trained on


@dataclass(frozen=True, slots=True)
class Removal:
    """The row of a document that goes, the row because of which it goes, and their Jaccard index if it was computed."""

    row: int
    other: int
    why: Why
    jaccard: float | None
    words: int | None = None  # that they share in a row, at least


def removals(candidates: Candidates, threshold: float, jaccard: Callable[[int, int], float]) -> Iterator[Removal]:
    """The documents of the input that go, in order.

    Args:
        candidates: what is known of each; no other document goes.
        threshold: the Jaccard index from which on two documents are near copies.
        jaccard: computes the Jaccard index of two rows.
    """
    _, same = np.unique(candidates.digests.view("V32")[:, 0], return_inverse=True)
    first = np.full(len(same), -1)  # of the rows with the same words, the one that stays
    members = _Members(candidates.groups)
    for row, words in enumerate(same):
        removal = None
        if row >= candidates.before:
            removal = _removal(candidates, row, int(first[words]), members, threshold, jaccard)
        if removal is not None:
            yield removal
            continue
        if first[words] < 0:
            first[words] = row
        members.add(row)


def _removal(
    candidates: Candidates,
    row: int,
    same: int,
    members: "_Members",
    threshold: float,
    jaccard: Callable[[int, int], float],
) -> Removal | None:
    test = int(candidates.shared[row])
    if test >= 0:
        return Removal(row, test, Why.CONTAMINATED, None, COMMON_RUN)
    if same >= 0:
        return Removal(row, same, Why.CONTAMINATED if same < candidates.tests else Why.EXACT, 1.0)
    found = members.beside(row)
    sizes, size = candidates.sizes[found], candidates.sizes[row]
    # two sets have at most the Jaccard index of the shorter one within the longer one
    found = found[np.minimum(sizes, size) / np.maximum(sizes, size) >= threshold]
    for other in found.tolist():
        index = jaccard(row, other)
        if index >= threshold:
            return Removal(row, other, Why.CONTAMINATED if other < candidates.tests else Why.NEAR, index)
    return None


class _Members:
    """The documents that stay, by band and group."""

    def __init__(self, groups: NDArray[np.int32]) -> None:
        """``groups``: as in ``Candidates``."""
        self._groups = groups
        self._begins: list[NDArray[np.int64]] = []  # of each group, among the rows of a band
        self._ends: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.int32]] = []
        for band in range(groups.shape[1]):
            sizes = np.bincount(groups[groups[:, band] >= 0, band])
            self._begins.append(np.concatenate([[0], np.cumsum(sizes)]))
            self._ends.append(self._begins[-1].copy())
            self._rows.append(np.zeros(sizes.sum(), np.int32))

    def add(self, row: int) -> None:
        """A document stays."""
        for band, group in enumerate(self._groups[row].tolist()):
            if group >= 0:
                self._rows[band][self._ends[band][group]] = row
                self._ends[band][group] += 1

    def beside(self, row: int) -> NDArray[np.int32]:
        """The documents of its groups that stay, in order."""
        found = [
            self._rows[band][self._begins[band][group] : self._ends[band][group]]
            for band, group in enumerate(self._groups[row].tolist())
            if group >= 0
        ]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *found]))
