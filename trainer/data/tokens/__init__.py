"""From text to a file of token ids on disk, made once and read by all processes in place."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainer.data.corpus import Corpus
from trainer.data.tokens import cache
from trainer.data.tokens.builder import Limits, build
from trainer.data.tokens.tokenizer import Definition, find
from trainer.errors import UserError

__all__ = ["Definition", "Limits", "TokenFile", "find", "load", "workers_here"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """A tokenised corpus.

    Attributes:
        name: of the corpus.
        number: its weight or its interval.
        ids: all documents, one after the other, each ended by ``</s>``; memory-mapped, one-dimensional.
        bounds: where in ``ids`` each document begins, and at last the length of ``ids``; memory-mapped.
        sources: the files that the text came from, or the name of the built-in corpus.
        digest: SHA-256 of ``ids``.
        tokenizer: SHA-256 of the tokenizer.
        corrupt_lines: those that were left out: file, line, why.
    """

    name: str
    number: Fraction | None
    ids: np.ndarray
    bounds: np.ndarray
    sources: Sequence[str]
    digest: str
    tokenizer: str
    corrupt_lines: Sequence[str]


def workers_here() -> int:
    """How many processes this one may use at once."""
    return len(os.sched_getaffinity(0))


def load(corpus: Corpus, tokenizer: Definition, limits: Limits, grows: Callable[[], None] = lambda: None) -> TokenFile:
    """Tokenise a corpus, or find it in the cache.

    Args:
        corpus: where its text is.
        tokenizer: what makes tokens of it.
        limits: of corrupt lines and processes.
        grows: called, from another thread, every few minutes in which there are more tokens than before.

    Raises:
        UserError: the text is missing, unreadable, empty, or has too many corrupt lines.
    """
    inputs = [cache.FORMAT, cache.versions(corpus.files()), tokenizer.digest]
    name = "tokens-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    folder = cache.folder()
    entry = folder / name
    if not entry.exists():
        with cache.watched(folder, name, grows), cache.one_builder(folder, name):
            if not entry.exists():
                build(entry, corpus, tokenizer, limits)
    about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    corrupt = about["corrupt_lines"]
    if len(corrupt) > limits.corrupt_lines:
        raise UserError(
            f"{corpus.name} was tokenised without {len(corrupt)} corrupt lines, more than "
            f"data.max_corrupt_lines={limits.corrupt_lines}: mend or remove them, {entry / 'about.json'} names them."
        )
    return TokenFile(
        name=corpus.name,
        number=corpus.number,
        ids=np.load(entry / "ids.npy", mmap_mode="r") if about["tokens"] else np.empty(0, np.uint16),
        bounds=np.load(entry / "bounds.npy", mmap_mode="r"),
        sources=corpus.sources,
        digest=about["digest"],
        tokenizer=about["tokenizer"],
        corrupt_lines=corrupt,
    )
