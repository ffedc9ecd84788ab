"""One piece of a corpus, from text to tokens in a file of its own; in a process of its own where there are many."""

import json
import os
import signal
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.data import corpus
from trainer.data.corpus import Corrupt, Span
from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = 2

# Of text in one call of the tokenizer: its answer takes about fifty times as much memory.
_CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of a piece: all documents, one after the other, each ended by ``</s>``; and what was left out."""

    ids: np.ndarray
    lengths: np.ndarray
    corrupt: list[Corrupt]


def tokenizer_of(definition: str) -> "Tokenizer":
    """Text that spells a special token is text: nobody's document ends where it quotes ``</s>``."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(piece: Sequence[Span], tokenizer: "Tokenizer", dtype: np.dtype) -> Part:
    """Turn the documents of a piece into tokens."""
    ids, lengths, corrupt = [np.empty(0, dtype)], [], []
    for batch in _batches(piece, corrupt):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids.append(np.array([*encoding.ids, END_OF_DOCUMENT], dtype))
            lengths.append(len(ids[-1]))
    return Part(np.concatenate(ids), np.array(lengths, np.int64), corrupt)


def _batches(piece: Sequence[Span], corrupt: list[Corrupt]) -> Iterator[list[str]]:
    batch, size = [], 0
    for span in piece:
        for text in corpus.documents(span):
            if isinstance(text, Corrupt):
                corrupt.append(text)
                continue
            batch.append(text)
            size += len(text)
            if size >= _CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def write(path: Path, part: Part) -> None:
    """Write ``part`` so that after a crash ``path`` holds all of it or does not exist."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    corrupt = json.dumps([astuple(line) for line in part.corrupt]).encode()
    with temporary.open("wb") as file:
        np.savez(file, ids=part.ids, lengths=part.lengths, corrupt=np.frombuffer(corrupt, np.uint8))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Part | None:
    """What :func:`write` wrote; None where there is nothing, or nothing whole."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # which checks the CRC of each
            corrupt = [Corrupt(*line) for line in json.loads(arrays["corrupt"].tobytes())]
            return Part(arrays["ids"], arrays["lengths"], corrupt)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def serve(pipe: Connection, definition: str, dtype: str) -> None:
    """Encode what is asked for until there is nobody left to ask: the life of a worker process.

    Requests are (piece, path); answers are None, or the error of a user's mistake.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    tokenizer = tokenizer_of(definition)
    while True:
        try:
            piece, path = pipe.recv()
        except (EOFError, ConnectionError):
            return
        answer = None
        try:
            write(path, encode(piece, tokenizer, np.dtype(dtype)))
        except UserError as error:
            answer = error
        try:
            pipe.send(answer)
        except ConnectionError:
            return
