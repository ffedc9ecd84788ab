"""Where the documents of a tokenised corpus are: file, line and byte. Documents are numbered through the corpus."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.corpus import Document, Span, located, newlines
from trainer.data.tokens import Definition, TokenFile
from trainer.data.tokens.builder import cut
from trainer.data.tokens.encode import tokenizer_of
from trainer.errors import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document begins.

    Attributes:
        path: the file.
        line: of the file, from 1.
        offset: the byte at which the line begins.
    """

    path: Path
    line: int
    offset: int


def find(
    tokens: TokenFile,
    files: Sequence[Path],
    documents: Sequence[int],
    tokenizer: Definition,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[int, Place]:
    """Find documents of a corpus by their numbers, and check that their text still gives the same tokens.

    A token file that does not tell how many documents its pieces have is counted from the beginning of the corpus.

    Args:
        tokens: the tokenised corpus.
        files: all files of the corpus, in its order.
        documents: numbers of documents, from 0.
        tokenizer: of the corpus.
        progress: called with a line of text for each piece that is counted.

    Raises:
        UserError: a file cannot be read, or a document is not where it was.
    """
    encode = tokenizer_of(tokenizer.text)
    found: dict[int, Place] = {}
    counter = _Lines()
    for number, span, document in _chosen(cut(files), tokens.piece_documents, set(documents), progress):
        place = Place(span.path, counter.before(span, document) + 1, document.offset)
        ids = np.array(encode.encode(document.text, add_special_tokens=False).ids, tokens.ids.dtype)
        trained = tokens.ids[tokens.bounds[number] : tokens.bounds[number + 1] - 1]  # without the end of the document
        if not np.array_equal(ids, trained):
            raise UserError(
                f"{place.path}:{place.line} has changed since it was tokenised: the tokens of this document had the "
                f"digest {_digest(trained)}, and have {_digest(ids)} now. Restore the file as it was."
            )
        found[number] = place
    if missing := set(documents) - found.keys():
        raise UserError(
            f"{tokens.name}: {', '.join(map(str, files[:3]))} has changed since it was tokenised: it has no document "
            f"{min(missing)} any more. Restore the file as it was; its tokens had the digest {tokens.digest}."
        )
    return found


def _chosen(
    pieces: Sequence[Sequence[Span]],
    counts: Sequence[int] | None,
    wanted: set[int],
    progress: Callable[[str], None],
) -> Iterator[tuple[int, Span, Document]]:
    """The wanted documents: number, span, document. Where ``counts`` is known, other pieces are not read."""
    first = 0
    last = max(wanted, default=-1)
    for index, piece in enumerate(pieces):
        if first > last:
            return
        if counts and wanted.isdisjoint(range(first, first + counts[index])):
            first += counts[index]
            continue
        if not counts:
            progress(f"finding documents: piece {index + 1} of {len(pieces)}")
        for span in piece:
            for document in located(span):
                if not isinstance(document, Document):
                    continue
                if first in wanted:
                    yield first, span, document
                first += 1


class _Lines:
    """Counts the lines before a document. Each byte of a file is read once, because documents come in order."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._offset = self._lines = 0

    def before(self, span: Span, document: Document) -> int:
        """The number of lines of the file before the line of ``document``."""
        if span.path != self._path:
            self._path, self._offset, self._lines = span.path, 0, 0
        self._lines += newlines(span.path, self._offset, document.offset)
        self._offset = document.offset
        return self._lines


def _digest(ids: np.ndarray) -> str:
    return "sha256:" + hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()
