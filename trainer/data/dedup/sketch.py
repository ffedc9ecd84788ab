"""What is computed of each document of a piece: its digest, its size, its MinHash, what it shares with test texts."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.corpus import CorruptLine, Document, Span, located
from trainer.data.dedup.words import COMMON_RUN, RUN, Hashes, digest, mixed, runs, words

PERMUTATIONS = 128
_MISSED = 1e-4  # of the pairs at the threshold, at most
LEAST_THRESHOLD = 0.1  # below 0.07, 128 values cannot keep that


def bands_for(threshold: float) -> int:
    """The number of bands, so that MinHash misses fewer than one in 10,000 of the pairs at the threshold.

    A pair with the Jaccard index J agrees in all r values of one of b bands with a probability of 1 - (1 - Jʳ)ᵇ
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). More bands of fewer values find more, and compare
    more pairs in vain. At 0.95 they are 16, of eight values each.
    """
    return next(
        PERMUTATIONS // rows
        for rows in (8, 4, 2, 1)
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) < _MISSED or rows == 1
    )


@dataclass(frozen=True, kw_only=True)
class Sketches:
    """The documents of one piece, in order.

    Attributes:
        offsets: the byte at which each begins, ``[documents]``.
        spans: the number of the span within the piece that holds each, ``[documents]``.
        sizes: how many different runs each has, ``[documents]``.
        digests: of the words of each, 32 bytes, ``[documents, 32]``.
        bands: a number for each band of its MinHash, ``[documents, bands]``; no bands where the engine keeps them.
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
        corrupt = json.dumps([astuple(line) for line in self.corrupt])  # numpy would give each text the longest's width
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        save_arrays(path, corrupt=np.frombuffer(corrupt.encode(), np.uint8), **arrays)

    @classmethod
    def read(cls, path: Path) -> "Sketches":
        """Read what :meth:`save` has written."""
        with np.load(path) as file:
            corrupt = tuple(CorruptLine(*line) for line in json.loads(file["corrupt"].tobytes()))
            return cls(corrupt=corrupt, **{name: file[name] for name in _ARRAYS})


_ARRAYS = ("offsets", "spans", "sizes", "digests", "bands", "shared")


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to a file, whole or not at all. Two processes may do so at once: each has a name of its own."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class CommonRuns:
    """All runs of 13 words of the test texts, sorted, and the first text that has each."""

    runs: Hashes
    texts: NDArray[np.int64]

    def first_shared(self, found: Hashes) -> int:
        """The first test text that has one of these runs; −1 if none has. There is at least one run."""
        places = np.minimum(np.searchsorted(self.runs, found), len(self.runs) - 1)
        hits = self.texts[places[self.runs[places] == found]]
        return int(hits.min()) if len(hits) else -1

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all."""
        save_arrays(path, runs=self.runs, texts=self.texts)


@lru_cache(maxsize=1)
def read_common_runs(path: Path) -> CommonRuns:
    """Read what :meth:`CommonRuns.save` has written, once in a process."""
    with np.load(path) as file:
        return CommonRuns(file["runs"], file["texts"])


def common_runs(texts: Sequence[Hashes]) -> CommonRuns:
    """Of the words of test texts. A text of fewer than 13 words is compared as a whole only, by its Jaccard index."""
    each = [runs(text, COMMON_RUN) if len(text) >= COMMON_RUN else np.zeros(0, np.uint64) for text in texts]
    owners = np.repeat(np.arange(len(each)), [len(one) for one in each])
    found, first = np.unique(np.concatenate([*each, np.zeros(0, np.uint64)]), return_index=True)
    return CommonRuns(found, owners[first].astype(np.int64))


NO_RUNS = common_runs([])


class Examination:
    """Goes through the documents of a piece once, and notes what is needed of each."""

    def __init__(self, spans: Sequence[Span], tests: CommonRuns) -> None:
        """``tests``: what no document may share."""
        self._spans = spans
        self._tests = tests
        self._offsets: list[int] = []
        self._of_span: list[int] = []
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self._shared: list[int] = []
        self._corrupt: list[CorruptLine] = []

    def sets(self) -> Iterator[Hashes]:
        """The set of runs of each document, in order.

        Raises:
            UserError: a file cannot be read, or it holds something else than lines of JSON.
        """
        for number, span in enumerate(self._spans):
            for each in located(span):
                if not isinstance(each, Document):
                    self._corrupt.append(each)
                    continue
                hashes = words(each.text)
                found = np.unique(runs(hashes, RUN))
                self._offsets.append(each.offset)
                self._of_span.append(number)
                self._sizes.append(len(found))
                self._digests.append(digest(each.text))
                long = len(hashes) >= COMMON_RUN and len(self._tests.runs)
                self._shared.append(self._tests.first_shared(runs(hashes, COMMON_RUN)) if long else -1)
                yield found

    def sketches(self, bands: Hashes | None = None) -> Sketches:
        """What was noted, with the bands of the documents if there are any."""
        return Sketches(
            offsets=np.array(self._offsets, np.int64),
            spans=np.array(self._of_span, np.int32),
            sizes=np.array(self._sizes, np.int32),
            digests=np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 32),
            bands=np.zeros((len(self._offsets), 0), np.uint64) if bands is None else bands,
            shared=np.array(self._shared, np.int64),
            corrupt=tuple(self._corrupt),
        )


def sketch(piece: Sequence[Span], tests: CommonRuns, seed: int, bands: int) -> Sketches:
    """Sketch the documents of a piece with rensa's MinHash.

    Raises:
        UserError: a file cannot be read, or it holds something else than lines of JSON.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without types)

    examination = Examination(piece, tests)
    sets = list(examination.sets())
    bounds = np.concatenate([[0], np.cumsum([len(one) for one in sets])]).astype(np.uint64)
    flat = np.concatenate([*sets, np.zeros(0, np.uint64)])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, bounds, PERMUTATIONS, seed).to_rows() if sets else []
    return examination.sketches(_bands(np.array(rows, np.uint32).reshape(-1, PERMUTATIONS), bands))


def _bands(values: NDArray[np.uint32], bands: int) -> Hashes:
    """A number for each band of values: pairs with an equal number are compared exactly."""
    each = values.reshape(len(values), bands, PERMUTATIONS // bands).astype(np.uint64)
    numbers = np.zeros((len(values), bands), np.uint64)
    for place in range(each.shape[2]):
        numbers = mixed(numbers + each[:, :, place])
    return numbers
