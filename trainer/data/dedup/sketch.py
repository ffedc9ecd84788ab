"""What is computed of each document of a piece: its digest, its MinHash, and what it shares with test texts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.corpus import CorruptLine, Document, Span, located
from trainer.data.dedup.words import COMMON_RUN, RUN, Hashes, digest, runs, words

PERMUTATIONS = 128
BANDS = 16
"""Of eight values each. A pair at J = 0.95 agrees in one of them with a probability of 1 − (1 − 0.95⁸)¹⁶ > 0.9999."""

_ROWS = PERMUTATIONS // BANDS


@dataclass(frozen=True, kw_only=True)
class Sketches:
    """The documents of one piece, in order.

    Attributes:
        offsets: the byte at which each begins, ``[documents]``.
        spans: the number of the span within the piece that holds each, ``[documents]``.
        sizes: how many different runs each has, ``[documents]``.
        digests: of the words of each, 32 bytes, ``[documents, 32]``.
        bands: a number for each band of its MinHash, ``[documents, BANDS]``.
        shared: the test text with which each shares a run of 13 words, −1 for none, ``[documents]``.
        corrupt: lines that are no documents.
    """

    offsets: NDArray[np.int64]
    spans: NDArray[np.int32]
    sizes: NDArray[np.int32]
    digests: NDArray[np.uint8]
    bands: Hashes
    shared: NDArray[np.int64]
    corrupt: tuple[CorruptLine, ...]

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        corrupt = np.array([(line.path, str(line.line), line.why) for line in self.corrupt], np.str_).reshape(-1, 3)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with temporary.open("wb") as file:
            np.savez(file, corrupt=corrupt, **arrays)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Sketches":
        """Read what :meth:`save` has written."""
        with np.load(path) as file:
            corrupt = tuple(CorruptLine(str(name), int(line), str(why)) for name, line, why in file["corrupt"])
            return cls(corrupt=corrupt, **{name: file[name] for name in _ARRAYS})


_ARRAYS = ("offsets", "spans", "sizes", "digests", "bands", "shared")


@dataclass(frozen=True)
class CommonRuns:
    """All runs of 13 words of the test texts, sorted, and the first text that has each."""

    runs: Hashes
    texts: NDArray[np.int64]

    def first_shared(self, found: Hashes) -> int:
        """The first test text that has one of these runs; −1 if none has."""
        if not len(self.runs):
            return -1
        places = np.minimum(np.searchsorted(self.runs, found), len(self.runs) - 1)
        hits = self.texts[places[self.runs[places] == found]]
        return int(hits.min()) if len(hits) else -1


def common_runs(texts: Sequence[Hashes]) -> CommonRuns:
    """Of the words of test texts. A text of fewer than 13 words is compared as a whole only, by its Jaccard index."""
    each = [runs(text, COMMON_RUN) if len(text) >= COMMON_RUN else np.zeros(0, np.uint64) for text in texts]
    owners = np.repeat(np.arange(len(each)), [len(one) for one in each])
    found, first = np.unique(np.concatenate([*each, np.zeros(0, np.uint64)]), return_index=True)
    return CommonRuns(found, owners[first].astype(np.int64))


def sketch(piece: Sequence[Span], tests: CommonRuns, seed: int) -> Sketches:
    """Sketch the documents of a piece.

    Raises:
        UserError: a file cannot be read, or it holds something else than lines of JSON.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without types)

    offsets, spans, digests, sets, shared, corrupt = [], [], [], [], [], []
    for number, span in enumerate(piece):
        for each in located(span):
            if not isinstance(each, Document):
                corrupt.append(each)
                continue
            hashes = words(each.text)
            offsets.append(each.offset)
            spans.append(number)
            digests.append(np.frombuffer(digest(each.text), np.uint8))
            sets.append(np.unique(runs(hashes, RUN)))
            shared.append(tests.first_shared(runs(hashes, COMMON_RUN)) if len(hashes) >= COMMON_RUN else -1)
    sizes = [len(one) for one in sets]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    flat = np.concatenate([*sets, np.zeros(0, np.uint64)])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, bounds, PERMUTATIONS, seed).to_rows() if sets else []
    return Sketches(
        offsets=np.array(offsets, np.int64),
        spans=np.array(spans, np.int32),
        sizes=np.array(sizes, np.int32),
        digests=np.array(digests, np.uint8).reshape(-1, 32),
        bands=_bands(np.array(rows, np.uint32).reshape(-1, PERMUTATIONS)),
        shared=np.array(shared, np.int64),
        corrupt=tuple(corrupt),
    )


def _bands(values: NDArray[np.uint32]) -> Hashes:
    """A number for each band of eight values: pairs with an equal number are compared exactly."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), BANDS, _ROWS * 4)
    numbers = [
        int.from_bytes(hashlib.blake2b(band.tobytes(), digest_size=8).digest(), "little") for row in raw for band in row
    ]
    return np.array(numbers, np.uint64).reshape(-1, BANDS)
