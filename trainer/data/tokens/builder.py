"""Build the token file of a corpus: piece by piece, with several processes. An interrupted build continues."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import BinaryIO

import numpy as np

from opt_ops.contract.files import write_durably
from trainer.console import print_line
from trainer.data.corpus import Corpus, Span, whole
from trainer.data.lines import CorruptLine, named
from trainer.data.tokens import cache, encode
from trainer.data.tokens.progress import BuildProgress
from trainer.data.tokens.tokenizer import Definition
from trainer.errors import UserError

# Bytes of text in a piece. The size does not change the tokens, but a build can only continue with pieces of its size.
PIECE = 1 << 23

# Parts of an abandoned build are removed after this time.
_ABANDONED_SECONDS = 7 * 86400


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildLimits:
    """How many lines may be corrupt, and how many processes may work at once."""

    corrupt_lines: int
    workers: int


def build(entry: Path, corpus: Corpus, tokenizer: Definition, limits: BuildLimits) -> None:
    """Build the folder ``entry``. A build that was interrupted continues.

    Raises:
        UserError: the text cannot be read, has too many corrupt lines, or changed during the build.
        RuntimeError: a worker process has died.
        OSError: a file cannot be written.
    """
    files = corpus.files()
    before = cache.versions(files)
    pieces = cut(files)
    folder = entry.with_name(f".{entry.name}.parts")
    _remove_abandoned(folder)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part-{index:06d}-of-{len(pieces):06d}.npz" for index in range(len(pieces))]
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    sizes = _make_parts(pieces, paths, corpus.name, tokenizer, dtype, limits)
    if cache.versions(files) != before:
        shutil.rmtree(folder)
        raise UserError(f"{corpus.name}: its files changed while they were read. Start again when they are complete.")
    _join(entry, paths, sizes, dtype, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the parts of other builds that nobody has continued for long. Their text has changed since."""
    for path in folder.parent.glob(".tokens-*"):
        if path != folder and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def cut(files: Sequence[Path], size: int | None = None) -> list[list[Span]]:
    """Cut ``files`` into pieces, in order. A piece is several small files or part of one.

    Args:
        files: are read as they are named.
        size: of a piece, about, in bytes. ``PIECE`` if left out.
    """
    pieces: list[list[Span]] = [[]]
    room = size = size or PIECE
    for file in files:
        rest = whole(file)
        while rest.end > rest.begin:
            can_be_cut = file.suffix not in {".py", ".txt"}
            end = min(rest.end, rest.begin + room) if can_be_cut else rest.end
            pieces[-1].append(Span(file, rest.begin, end))
            room -= end - rest.begin
            rest = Span(file, end, rest.end)
            if room <= 0:
                pieces.append([])
                room = size
    return [piece for piece in pieces if piece]


def _make_parts(
    pieces: Sequence[Sequence[Span]],
    paths: Sequence[Path],
    name: str,
    tokenizer: Definition,
    dtype: np.dtype,
    limits: BuildLimits,
) -> list[tuple[int, int]]:
    """Write the parts that are missing. Returns the number of tokens and of documents of each part."""
    counts = [(0, 0)] * len(paths)
    corrupt: list[CorruptLine] = []
    sizes = [sum(span.end - span.begin for span in piece) for piece in pieces]
    with BuildProgress(name, sum(sizes)) as progress:

        def done(index: int, part: encode.TokenPart) -> None:
            corrupt.extend(part.corrupt)
            counts[index] = len(part.ids), len(part.lengths)
            progress.add(sizes[index], len(part.ids))
            if len(corrupt) > limits.corrupt_lines:
                raise UserError(_too_many(name, corrupt, limits.corrupt_lines))

        missing = []
        for index, path in enumerate(paths):
            part = encode.read(path)
            if part is None:
                missing.append(index)
            else:
                done(index, part)
        if missing and len(missing) < len(paths):
            progress.print_line(f"{name}: {len(paths) - len(missing)} of {len(paths)} parts exist already")
        tasks = [(index, pieces[index], paths[index]) for index in missing]
        if len(tasks) == 1:  # no worker: starting one takes time, and the library uses all cores by itself
            index, piece, path = tasks[0]
            part = encode.encode(piece, encode.tokenizer_of(tokenizer.text), dtype)
            encode.write(path, part)
            done(index, part)
        elif tasks:
            _in_processes(tasks, tokenizer.text, dtype, limits.workers, done)
    for line in named(corrupt):
        print_line(f"{line}; skipped", sys.stderr)
    return counts


def _in_processes(
    tasks: Sequence[tuple[int, Sequence[Span], Path]],
    definition: str,
    dtype: np.dtype,
    workers: int,
    done: Callable[[int, encode.TokenPart], None],
) -> None:
    """Distribute ``tasks`` to worker processes. A worker whose parent has died ends after its piece."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads and locks of torch
    left = iter(tasks)
    busy: dict[Connection, tuple[int, Path]] = {}
    processes = []

    def deal(pipe: Connection) -> None:
        if task := next(left, None):
            index, piece, path = task
            pipe.send((piece, path))
            busy[pipe] = index, path

    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=encode.serve, args=(theirs, definition, dtype.str), daemon=True)
            process.start()
            theirs.close()
            processes.append((process, ours))
            deal(ours)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                index, path = busy.pop(pipe)
                if error := pipe.recv():
                    raise error
                deal(pipe)
                part = encode.read(path)
                assert part is not None, path
                done(index, part)
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            "a process that makes tokens has died, perhaps because memory was short. Start the build again with fewer "
            "workers; it continues where it stopped."
        ) from error
    finally:
        for process, pipe in processes:
            pipe.close()
            process.terminate()
            process.join()


def _too_many(name: str, corrupt: Sequence[CorruptLine], limit: int) -> str:
    return (
        f"{'; '.join(named(corrupt))}. More corrupt lines than data.max_corrupt_lines={limit} in {name}: repair or "
        "remove them, or raise the limit to skip them. The tokens that exist by then are kept."
    )


def _join(
    entry: Path, paths: Sequence[Path], sizes: Sequence[tuple[int, int]], dtype: np.dtype, tokenizer: Definition
) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.mkdir(exist_ok=True)  # with the user's usual permissions: a team may share a cache
    try:
        tokens, documents = (sum(counts) for counts in zip((0, 0), *sizes, strict=True))
        digest = hashlib.sha256()
        corrupt: list[CorruptLine] = []
        with (temporary / "ids.npy").open("wb") as ids, (temporary / "bounds.npy").open("wb") as bounds:
            _write_header(ids, dtype, tokens)
            _write_header(bounds, np.dtype(np.int64), documents + 1)
            end = np.zeros(1, np.int64)
            bounds.write(end.tobytes())
            for part in _parts(paths):
                ids.write(part.ids.data)
                digest.update(part.ids.data)
                ends = np.cumsum(part.lengths) + end[-1]
                bounds.write(ends.tobytes())
                end = ends if len(ends) else end
                corrupt += part.corrupt
            for file in (ids, bounds):
                file.flush()
                os.fsync(file.fileno())
        write_durably(temporary / "tokenizer.json", tokenizer.text)
        about = {
            "v": 1,
            "digest": "sha256:" + digest.hexdigest(),
            "tokenizer": tokenizer.digest,
            "tokens": tokens,
            "documents": documents,
            "piece_bytes": PIECE,  # with the next, a document is found without reading the whole corpus
            "piece_documents": [count for _, count in sizes],
            "corrupt_lines": [str(line) for line in corrupt],
        }
        write_durably(temporary / "about.json", json.dumps(about, indent=1) + "\n")
        temporary.rename(entry)
    except OSError:
        if not entry.exists():  # otherwise another process has built the same entry
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parts(paths: Sequence[Path]) -> Iterator[encode.TokenPart]:
    """The parts in order. Only one is in memory at a time."""
    for path in paths:
        part = encode.read(path)
        if part is None:
            raise FileNotFoundError(path)
        yield part


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
