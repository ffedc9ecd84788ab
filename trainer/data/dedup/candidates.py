"""Documents that may be copies of one another: the only ones of which anything is kept in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.dedup.pieces import Piece, Survey
from trainer.data.dedup.sketch import Sketches
from trainer.data.dedup.words import Hashes

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of documents that agree in a band of MinHash.

    Attributes:
        numbers: of the documents that are in any group, in order, ``[rows]``.
        of_band: the number of the group of each in a band, −1 for none, ``[rows, bands]``.
    """

    numbers: Numbers
    of_band: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All test texts, all documents that share words with one, and all that are in a group of a band.

    Exact copies agree in all bands, so they are among them. A row of a test text has the text's own number.

    Attributes:
        numbers: of the documents, in order, ``[rows]``.
        tests: how many rows are test texts.
        before: how many rows are test texts or documents of older corpora.
        digests: of the words of each, ``[rows, 32]``.
        sizes: how many different runs each has, ``[rows]``.
        shared: the test text with which each shares a run of 13 words, −1 for none, ``[rows]``.
        groups: as in ``Groups``, ``[rows, bands]``.
        paths: files.
        files: the number in ``paths`` of the file that holds each, ``[rows]``.
        offsets: the byte at which each begins, ``[rows]``.
    """

    numbers: Numbers
    tests: int
    before: int
    digests: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    shared: NDArray[np.int64]
    groups: NDArray[np.int32]
    paths: Sequence[Path]
    files: NDArray[np.int32]
    offsets: Numbers

    def place(self, row: int) -> tuple[Path, int]:
        """The file that holds a document, and the byte at which it begins."""
        return self.paths[self.files[row]], int(self.offsets[row])


def grouped(bands: Hashes) -> Groups:
    """Of the bands of all documents, ``[documents, bands]``."""
    of_band = np.full(bands.shape, -1, np.int32)
    for band in range(bands.shape[1]):
        _, place, count = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        of_band[:, band] = np.where(count[place] > 1, place, -1)
    numbers = np.flatnonzero((of_band >= 0).any(axis=1))
    return Groups(numbers=numbers, of_band=of_band[numbers])


def chained(read: Sequence[Callable[[], tuple[Numbers, Numbers]]]) -> Groups:
    """Of links between documents, as datatrove writes them.

    Args:
        read: for each band, reads the links of a document to the next one of its group, group after group. A document
            is in one group.
    """
    numbers = np.zeros(0, np.int64)
    for links in read:
        numbers = np.union1d(numbers, np.concatenate(links()))
    of_band = np.full((len(numbers), len(read)), -1, np.int32)
    for band, links in enumerate(read):
        one, next_one = links()
        group = np.cumsum(np.concatenate([[0], one[1:] != next_one[:-1]])[: len(one)])
        of_band[np.searchsorted(numbers, one), band] = group
        of_band[np.searchsorted(numbers, next_one), band] = group
    return Groups(numbers=numbers, of_band=of_band)


def candidates(pieces: Sequence[Piece], survey: Survey, groups: Groups) -> Candidates:
    """Read what is needed of each candidate, piece by piece."""
    numbers = np.union1d(groups.numbers, np.concatenate([np.arange(survey.tests), survey.shared]))
    of_band = np.full((len(numbers), groups.of_band.shape[1]), -1, np.int32)
    of_band[np.searchsorted(numbers, groups.numbers)] = groups.of_band
    paths = list(dict.fromkeys(span.path for piece in pieces for span in piece.spans))
    number_of = {path: number for number, path in enumerate(paths)}
    digests = [np.zeros((0, 32), np.uint8)]
    sizes = [np.zeros(0, np.int32)]
    shared = [np.zeros(0, np.int64)]
    files = [np.zeros(0, np.int32)]
    offsets = [np.zeros(0, np.int64)]
    for piece, start, end in zip(pieces, survey.starts[:-1], survey.starts[1:], strict=True):
        found = Sketches.read(piece.sketches)
        rows = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, end)] - start
        of_span = np.array([number_of[span.path] for span in piece.spans], np.int32)
        digests.append(found.digests[rows])
        sizes.append(found.sizes[rows])
        shared.append(found.shared[rows])
        files.append(of_span[found.spans[rows]])
        offsets.append(found.offsets[rows])
    return Candidates(
        numbers=numbers,
        tests=survey.tests,
        before=int(np.searchsorted(numbers, survey.before)),
        digests=np.concatenate(digests),
        sizes=np.concatenate(sizes),
        shared=np.concatenate(shared),
        groups=of_band,
        paths=paths,
        files=np.concatenate(files),
        offsets=np.concatenate(offsets),
    )
