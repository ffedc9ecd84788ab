"""Turn text into a file of token ids. The file is built once, and all processes read it in place."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from trainer.console import print_line
from trainer.data.corpus import Corpus
from trainer.data.tokens import cache
from trainer.data.tokens.builder import PIECE, BuildLimits, build
from trainer.data.tokens.tokenizer import Definition, find
from trainer.errors import UserError

__all__ = ["BuildLimits", "Definition", "TokenFile", "find", "load", "usable_cores"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """A tokenised corpus.

    Attributes:
        name: of the corpus.
        number: its weight or its interval.
        ids: all documents, one after the other, each ended by ``</s>``. Memory-mapped, one-dimensional.
        bounds: where each document begins in ``ids``, followed by the length of ``ids``. Memory-mapped.
        sources: the files with the text, or the name of the built-in corpus.
        digest: SHA-256 of ``ids``.
        tokenizer: SHA-256 of the tokenizer.
        corrupt_lines: the lines that were skipped: file, line, reason.
        files: path, size and modification time of each file with the text.
        piece_documents: number of documents in each piece of the corpus (:func:`builder.cut`); None for an entry of the
            cache that does not tell.
    """

    name: str
    number: Fraction | None
    ids: np.ndarray
    bounds: np.ndarray
    sources: Sequence[str]
    digest: str
    tokenizer: str
    corrupt_lines: Sequence[str]
    files: Sequence[cache.FileVersion] = ()
    piece_documents: Sequence[int] | None = None


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def load(
    corpus: Corpus, tokenizer: Definition, limits: BuildLimits, grows: Callable[[], None] = lambda: None
) -> TokenFile:
    """Tokenise a corpus, or find it in the cache.

    Args:
        corpus: the text.
        tokenizer: the tokenizer.
        limits: of corrupt lines and processes.
        grows: called from another thread every few minutes in which tokens were added.

    Raises:
        UserError: the text is missing, empty or unreadable, or has too many corrupt lines.
        RuntimeError: a worker process has died.
    """
    versions = cache.versions(corpus.files())
    inputs = [cache.FORMAT, versions, tokenizer.digest]
    name = "tokens-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    folder = cache.folder()
    entry = folder / name
    if not _is_whole(entry):
        with cache.watched(folder, name, grows), cache.one_builder(folder, name):
            if not _is_whole(entry):
                if entry.exists():
                    print_line(f"{entry} is damaged, and is built again", sys.stderr)
                    shutil.rmtree(entry)  # who has mapped its files keeps them
                build(entry, corpus, tokenizer, limits)
    about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    corrupt = about["corrupt_lines"]
    if len(corrupt) > limits.corrupt_lines:
        raise UserError(
            f"{corpus.name} has {len(corrupt)} corrupt lines that were skipped, more than "
            f"data.max_corrupt_lines={limits.corrupt_lines}. {entry / 'about.json'} names them: repair or remove them."
        )
    if not about["tokens"]:
        raise UserError(f"{corpus.name}: {corpus.without_text()}")
    return TokenFile(
        name=corpus.name,
        number=corpus.number,
        ids=np.load(entry / "ids.npy", mmap_mode="r"),
        bounds=np.load(entry / "bounds.npy", mmap_mode="r"),
        sources=corpus.sources,
        digest=about["digest"],
        tokenizer=about["tokenizer"],
        corrupt_lines=corrupt,
        files=versions,
        piece_documents=about["piece_documents"] if about.get("piece_bytes") == PIECE else None,
    )


def _is_whole(entry: Path) -> bool:
    """Whether an entry of the cache has all of its parts, in their lengths. Its tokens are not read."""
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        ids, bounds = (np.load(entry / f"{name}.npy", mmap_mode="r") for name in ("ids", "bounds"))
        return about["tokens"] == len(ids) == bounds[-1]
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, TypeError, IndexError):
        return False
