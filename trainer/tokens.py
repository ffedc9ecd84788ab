"""From text to a file of token ids on disk, made once by one process and read by all of them in place."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import corpus
from trainer.errors import UserError
from trainer.manifest import write_durably

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The ids of OPT's dictionary.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
END_OF_DOCUMENT = 2

_FORMAT = 1  # of the cache: a new number makes the old entries unreachable
_DOCUMENTS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A tokenised corpus.

    Attributes:
        ids: all documents, one after the other, each ended by ``</s>``; memory-mapped, one-dimensional.
        sources: the files that the text came from, or the name of the built-in corpus.
        digest: SHA-256 of ``ids``.
        tokenizer: SHA-256 of the tokenizer.
    """

    ids: np.ndarray
    sources: Sequence[str]
    digest: str
    tokenizer: str


def load(data: Sequence[Path], tokenizer: Path | None, vocab_size: int) -> TokenFile:
    """Tokenise the corpus, or find it in the cache (``$OPT_OPS_CACHE``, else ``~/.cache/opt-ops``).

    Args:
        data: JSONL files, or folders of them; empty for the prose of Python's standard library.
        tokenizer: a ``tokenizer.json``, or a folder with one or with ``vocab.json`` and ``merges.txt``. None trains a
            byte-level BPE on the corpus.
        vocab_size: of the model; no token id reaches it.

    Raises:
        UserError: text or tokenizer is missing, unreadable or does not fit the model.
    """
    files = corpus.jsonl_files(data) if data else corpus.standard_library_files()
    sources = [str(path) for path in data] or ["Python standard library"]
    tokenizer_files = _tokenizer_files(tokenizer)
    inputs = [_FORMAT, _versions(files), _versions(tokenizer_files), vocab_size]
    name = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("OPT_OPS_CACHE") or Path.home() / ".cache" / "opt-ops")
    entry = cache / f"tokens-{name}"
    if not entry.exists():
        with _one_builder(cache, name):
            if not entry.exists():
                _build(entry, files, tokenizer_files, vocab_size)
    about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    ids = np.load(entry / "ids.npy", mmap_mode="r")
    return TokenFile(ids, sources, about["digest"], about["tokenizer"])


def _versions(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file does, without reading it."""
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


def _tokenizer_files(path: Path | None) -> list[Path]:
    if path is None:
        return []
    if path.is_file():
        return [path]
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        files = [path / name for name in names]
        if all(file.is_file() for file in files):
            return files
    raise UserError(
        f"--tokenizer {path}: expected a tokenizer.json, or a folder with tokenizer.json or vocab.json and merges.txt."
    )


@contextmanager
def _one_builder(cache: Path, name: str) -> Iterator[None]:
    """Let one process of this host build and the others wait; the kernel frees the lock of a builder that dies.

    Only saves work: entries appear by rename, so where the file system has no locks, several may build the same.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"tokens-{name}.lock").open("w")
    except OSError as error:
        raise UserError(f"no room for the tokenised data: {error}. Set OPT_OPS_CACHE to a writable folder.") from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(entry: Path, files: Sequence[Path], tokenizer_files: Sequence[Path], vocab_size: int) -> None:
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        tokenizer = _read_tokenizer(tokenizer_files) if tokenizer_files else _train_tokenizer(files, vocab_size)
        if tokenizer.get_vocab_size() > vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens but model.vocab_size is {vocab_size}: "
                "raise model.vocab_size or take a smaller tokenizer."
            )
        ids = _encode(files, tokenizer, np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32))
        with (temporary / "ids.npy").open("wb") as file:
            np.save(file, ids)
            os.fsync(file.fileno())
        definition = tokenizer.to_str()
        write_durably(temporary / "tokenizer.json", definition)
        about = {"digest": _sha256(ids.data), "tokenizer": _sha256(definition.encode())}
        write_durably(temporary / "about.json", json.dumps(about))
        temporary.rename(entry)
    except OSError:
        if not entry.exists():  # else another process has built the same, and either will do
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        for text in corpus.documents(file):
            if text := text.rstrip():
                yield text


def _encode(files: Sequence[Path], tokenizer: "Tokenizer", dtype: np.dtype[Any]) -> np.ndarray:
    texts = _texts(files)
    parts = [np.empty(0, dtype)]
    while batch := list(islice(texts, _DOCUMENTS_PER_BATCH)):
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        parts += [np.array([*encoding.ids, END_OF_DOCUMENT], dtype) for encoding in encodings]
    return np.concatenate(parts)


def _read_tokenizer(files: Sequence[Path]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        if len(files) == 1:
            tokenizer = Tokenizer.from_file(str(files[0]))
        else:
            vocab, merges = models.BPE.read_file(str(files[0]), str(files[1]))
            tokenizer = Tokenizer(models.BPE(vocab, merges))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"--tokenizer {files[0]}: not a tokenizer: {error}") from error
    found = tuple(tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
    if found != SPECIAL_TOKENS:
        raise UserError(
            f"--tokenizer {files[0]}: its first tokens are {found}, the model's are {SPECIAL_TOKENS}. "
            "Take the tokenizer of a released OPT model, or one with these ids."
        )
    return tokenizer


def _train_tokenizer(files: Sequence[Path], vocab_size: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    return tokenizer


def _sha256(content: bytes | memoryview) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
