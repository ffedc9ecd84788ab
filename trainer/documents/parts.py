"""The parts of documents in the samples of a batch, each with its file, line, first words, and perhaps its loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import places
from trainer.data.dataset import Dataset
from trainer.data.places import Place
from trainer.data.samples import Piece
from trainer.data.tokens.encode import tokenizer_of

_TEXT_CHARACTERS = 80
_TEXT_TOKENS = 2 * _TEXT_CHARACTERS  # a token may be a part of a character only


def parts(
    data: Dataset,
    files: Sequence[Sequence[Path]],
    pieces: Sequence[tuple[int, Sequence[Piece]]],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One mapping for each part of a document, in the order of the samples. ``docs/formats.md`` gives the keys.

    Args:
        data: what was trained on.
        files: of each corpus.
        pieces: of each sample: its corpus, and the parts of documents.
        progress: called with lines of text while documents are looked for.

    Raises:
        UserError: a document is not where it was.
    """
    where: list[dict[int, Place]] = []
    for corpus, (tokens, own) in enumerate(zip(data.corpora, files, strict=True)):
        numbers = sorted({piece.document for index, each in pieces if index == corpus for piece in each})
        where.append(places.find(tokens, own, numbers, data.tokenizer, progress) if numbers else {})
    decode = tokenizer_of(data.tokenizer.text)
    rows = []
    for sample, (corpus, each) in enumerate(pieces):
        tokens = data.corpora[corpus]
        for piece in each:
            place = where[corpus][piece.document]
            ids = tokens.ids[piece.source : piece.source + min(piece.tokens, _TEXT_TOKENS)]
            rows.append(
                {
                    "sample": sample,
                    "corpus": tokens.name,
                    "source": str(place.path),
                    "line": place.line,
                    "offset": place.offset,
                    "begins": piece.begins,
                    "tokens": piece.tokens,
                    "text": decode.decode(ids.tolist(), skip_special_tokens=True)[: 2 * _TEXT_CHARACTERS],
                    "loss": None,
                }
            )
    return rows


def with_losses(
    rows: Sequence[dict[str, Any]], pieces: Sequence[tuple[int, Sequence[Piece]]], losses: np.ndarray
) -> list[dict[str, Any]]:
    """``rows`` with the mean loss of each part, the highest first.

    Args:
        rows: as :func:`parts` returns them.
        pieces: of each sample.
        losses: of each predicted token, [samples, seq_len]: all tokens of a sample but its first.
    """
    found, index = [], 0
    for sample, (_, each) in enumerate(pieces):
        begin = 0
        for piece in each:
            own = losses[sample, max(0, begin - 1) : begin + piece.tokens - 1]
            found.append({**rows[index], "loss": float(own.mean()) if len(own) else None})
            begin, index = begin + piece.tokens, index + 1
    return sorted(found, key=lambda row: -np.inf if row["loss"] is None else -row["loss"])
