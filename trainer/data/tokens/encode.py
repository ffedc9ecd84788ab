"""Turn one piece of a corpus into a file of tokens. With several pieces, worker processes do it."""

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
from trainer.data.corpus import CorruptLine, Span
from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = 2

# Characters of text in one call of the tokenizer. Its answer takes about fifty times as much memory.
_CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenPart:
    """The tokens of a piece.

    Attributes:
        ids: of all documents, one after the other, each ended by ``</s>``.
        lengths: number of tokens of each document.
        corrupt: lines that were skipped.
    """

    ids: np.ndarray
    lengths: np.ndarray
    corrupt: list[CorruptLine]


def tokenizer_of(definition: str) -> "Tokenizer":
    """The tokenizer of a definition. Text that spells a special token, such as ``</s>``, is encoded as plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(piece: Sequence[Span], tokenizer: "Tokenizer", dtype: np.dtype) -> TokenPart:
    """Turn the documents of a piece into tokens.

    Raises:
        UserError: a file cannot be read.
    """
    ids, lengths, corrupt = [np.empty(0, dtype)], [], []
    for batch in _batches(piece, corrupt):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids.append(np.array([*encoding.ids, END_OF_DOCUMENT], dtype))
            lengths.append(len(ids[-1]))
    return TokenPart(np.concatenate(ids), np.array(lengths, np.int64), corrupt)


def _batches(piece: Sequence[Span], corrupt: list[CorruptLine]) -> Iterator[list[str]]:
    batch, size = [], 0
    for span in piece:
        for text in corpus.documents(span):
            if isinstance(text, CorruptLine):
                corrupt.append(text)
                continue
            batch.append(text)
            size += len(text)
            if size >= _CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def write(path: Path, part: TokenPart) -> None:
    """Write ``part``. After a crash, ``path`` holds all of it or does not exist.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    corrupt = json.dumps([astuple(line) for line in part.corrupt]).encode()
    with temporary.open("wb") as file:
        np.savez(file, ids=part.ids, lengths=part.lengths, corrupt=np.frombuffer(corrupt, np.uint8))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> TokenPart | None:
    """Read what :func:`write` wrote. None if the file does not exist or is damaged."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # np.load checks the CRC of each array
            corrupt = [CorruptLine(*line) for line in json.loads(arrays["corrupt"].tobytes())]
            return TokenPart(arrays["ids"], arrays["lengths"], corrupt)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def serve(pipe: Connection, definition: str, dtype: str) -> None:
    """Run a worker process: encode what is requested, until the parent closes the pipe.

    A request is (piece, path). The answer is None, or a :class:`UserError`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core
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
