r"""Words of a document, runs of words as 64-bit numbers, and the Jaccard index of two sets of runs.

A word is a maximal run of ``\w``, in lower case. Two people with these definitions find the same duplicates.
"""

import re
from functools import lru_cache
from hashlib import blake2b, sha256

import numpy as np
from numpy.typing import NDArray

RUN = 5
"""The words of a run: the set of a document is all its runs. A document of fewer words is one run."""

COMMON_RUN = 13
"""A training document that shares so many words in a row with a test text is contaminated (GPT-3, arXiv 2005.14165)."""

Hashes = NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost by multiplying
_MIX = np.uint64(0xBF58476D1CE4E5B9)


_KEPT_LENGTH = 64  # characters of a word whose number is kept: a million long ones would fill the memory


def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.lower().encode(), digest_size=8).digest(), "little")


_kept_hash = lru_cache(maxsize=1 << 20)(_word_hash)


def found_words(text: str) -> list[str]:
    """The words as they stand in the text."""
    return _WORD.findall(text)


def words(text: str) -> Hashes:
    """A number for each word, the same in each process."""
    found = found_words(text)
    return np.fromiter(
        (_kept_hash(word) if len(word) <= _KEPT_LENGTH else _word_hash(word) for word in found), np.uint64
    )


def digest(text: str) -> bytes:
    """SHA-256 of the words, in lower case and with one blank between two: equal for exact copies."""
    return sha256(" ".join(found_words(text)).lower().encode()).digest()


def runs(hashes: Hashes, length: int) -> Hashes:
    """A number for each run of ``length`` words, in order; one for a document of fewer words."""
    length = max(1, min(length, len(hashes)))
    total = np.zeros(max(1, len(hashes) - length + 1), np.uint64)
    if len(hashes):
        for offset in range(length):
            total = total * _BASE + hashes[offset : offset + len(total)]
    return mixed(total)


def mixed(numbers: Hashes) -> Hashes:
    """Other numbers, of equal ones equal ones: the low bits of a sum of products depend on its low bits alone."""
    return (numbers ^ (numbers >> np.uint64(31))) * _MIX


def run_set(text: str) -> Hashes:
    """The set of a document: its different runs, sorted."""
    return np.unique(runs(words(text), RUN))


def jaccard(one: Hashes, other: Hashes) -> float:
    """The Jaccard index of two sets: common members ÷ all members."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
