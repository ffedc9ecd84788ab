"""The files that are read, the pieces of work that they are cut into, and the number of each document.

Documents have numbers in the order of the pieces: test texts, then documents of older corpora, then those of the input.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opt_ops.contract.files import sha256
from trainer.data import content
from trainer.data.corpus import Span, jsonl_files
from trainer.data.dedup.sketch import Sketches
from trainer.data.tokens import builder
from trainer.errors import UserError

ROLES = ("against", "known", "input")
OWN_NAMES = ("dedup.json", "removed.jsonl.gz")

_MOST_PIECES = 500  # that datatrove's second step opens at once


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that is read, and its name in the folder."""

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Files, or a part of one, that one process reads, and the file of what it finds."""

    role: str
    spans: tuple[Span, ...]
    sketches: Path


def sources(paths: Sequence[Path], *, once: bool) -> list[Source]:
    """The files among ``paths``, in order, each with the name that it gets in the folder.

    Args:
        paths: files of JSON lines and folders of them.
        once: a file that is named twice is an error. Otherwise it is read once.

    Raises:
        UserError: a file is missing, is no file of JSON lines, or is named twice.
    """
    found: dict[tuple[int, int], Source] = {}
    for path in paths:
        for file in jsonl_files([path]):
            if file.suffix in {".txt", ".py"}:
                raise UserError(f'{file}: not JSON lines. Write its text as a line {{"text": "…"}} first.')
            content.require_lines(file)
            entry = file.lstat()  # a link is a file of its own
            same = (entry.st_dev, entry.st_ino)
            if once and same in found:
                raise UserError(f"{file} is named twice: all of it would be a copy. Name it once.")
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            if same not in found:
                found[same] = Source(path=file, name=name, sha256=sha256(file))
    return list(found.values())


def require_different_names(files: Sequence[Source]) -> None:
    """Check that each input has a name of its own in the folder.

    Raises:
        UserError: two have the same, or one has that of a file which is written there.
    """
    names: dict[str, Path] = {}
    for source in files:
        if source.name in OWN_NAMES:
            raise UserError(f"{source.path} would become {source.name}, which is written as well. Rename it.")
        if source.name in names:
            raise UserError(
                f"{names[source.name]} and {source.path} would both become {source.name}. Name the folder above them, "
                "or rename one."
            )
        names[source.name] = source.path


def require_outside(out: Path, paths: Sequence[Path]) -> None:
    """Check that the folder to write is in none of those that are read: its files would be read the next time.

    Raises:
        UserError: it is.
    """
    for path in paths:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} is in {path}, which is read. Name a folder beside it.")


def cut(of_role: dict[str, list[Source]], folder: Path) -> list[Piece]:
    """Cut the files of all roles into pieces. The size does not change what is found."""
    total = sum(source.path.stat().st_size for files in of_role.values() for source in files)
    size = max(builder.PIECE, total // _MOST_PIECES)
    return [
        Piece(role=role, spans=tuple(spans), sketches=folder / f"{role}-{number:05d}.npz")
        for role in ROLES
        for number, spans in enumerate(builder.cut([source.path for source in of_role[role]], size))
    ]


@dataclass(frozen=True)
class Survey:
    """How many documents there are, and which of them share words with a test text.

    Attributes:
        starts: the number of the first document of each piece, and that of all documents, ``[pieces + 1]``.
        tests: how many test texts there are.
        before: how many test texts and documents of older corpora there are.
        shared: documents of the input with a run of 13 words of a test text, in order.
        corrupt: how many lines of the input are no documents.
    """

    starts: NDArray[np.int64]
    tests: int
    before: int
    shared: NDArray[np.int64]
    corrupt: int

    @property
    def documents(self) -> int:
        """The number of documents of the input."""
        return int(self.starts[-1]) - self.before


def survey(pieces: Sequence[Piece]) -> Survey:
    """Read the sketches of all pieces, one after the other."""
    counts: list[int] = []
    shared = [np.zeros(0, np.int64)]
    number = Counter[str]()
    corrupt = 0
    for piece in pieces:
        found = Sketches.read(piece.sketches)
        shared.append(np.flatnonzero(found.shared >= 0) + sum(counts))
        counts.append(len(found.offsets))
        number[piece.role] += len(found.offsets)
        corrupt += len(found.corrupt) if piece.role == "input" else 0
    return Survey(
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        tests=number["against"],
        before=number["against"] + number["known"],
        shared=np.concatenate(shared),
        corrupt=corrupt,
    )


def kept(pieces: Sequence[Piece], survey: Survey, gone: NDArray[np.int64]) -> Iterator[tuple[Path, NDArray[np.int64]]]:
    """For each part of a file of the input, in order: the bytes at which the lines begin that stay."""
    for piece, start in zip(pieces, survey.starts[:-1], strict=True):
        if piece.role != "input":
            continue
        found = Sketches.read(piece.sketches)
        stays = np.ones(len(found.offsets), bool)
        stays[gone[np.searchsorted(gone, start) : np.searchsorted(gone, start + len(stays))] - start] = False
        bounds = np.searchsorted(found.spans[stays], np.arange(1, len(piece.spans)))
        for span, offsets in zip(piece.spans, np.split(found.offsets[stays], bounds), strict=True):
            yield span.path, offsets
