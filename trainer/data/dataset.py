"""The data of a run: training corpora and their mixture, validation corpora, tokenizer."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import tokens
from trainer.data.corpus import training_corpora, validation_corpora
from trainer.data.mixture import whole_parts
from trainer.data.samples import ORDER, Mixture, Samples
from trainer.data.tokens import BuildLimits, Definition, TokenFile
from trainer.errors import UserError
from trainer.hashing import key
from trainer.recipes import Recipe

_MOST_FILES = 256  # of a corpus, that config.json names one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Tokenised corpora.

    Attributes:
        training: corpora to train on.
        parts: the share of each training corpus, in whole numbers.
        validation: corpora to evaluate on. Their ``number`` is the interval.
        tokenizer: of all corpora.
    """

    training: Sequence[TokenFile]
    parts: Sequence[int]
    validation: Sequence[TokenFile]
    tokenizer: Definition

    @property
    def digest(self) -> str:
        """SHA-256 over everything that, with sizes and seed, decides which tokens a sample has."""
        mixed = [[part, file.digest] for part, file in zip(self.parts, self.training, strict=True)]
        return "sha256:" + hashlib.sha256(json.dumps([ORDER, mixed]).encode()).hexdigest()

    @property
    def validation_digest(self) -> str:
        """SHA-256 over the validation data and its intervals."""
        measured = [[file.name, str(file.number), file.digest] for file in self.validation]
        return "sha256:" + hashlib.sha256(json.dumps(measured).encode()).hexdigest()

    def samples(self, seq_len: int, seed: int) -> Mixture:
        """The samples to train on.

        Raises:
            UserError: a corpus is shorter than one sample.
        """
        corpora = []
        for index, file in enumerate(self.training):
            try:
                corpora.append(Samples(file.ids, seq_len, key(seed, index), file.bounds))
            except UserError as error:
                raise UserError(f"{file.name}: {error}") from error
        return Mixture(corpora, self.parts)

    def about(self) -> dict[str, Any]:
        """The description for ``config.json``."""
        shares = [part / sum(self.parts) for part in self.parts]
        return {
            "sources": [source for file in self.training for source in file.sources],
            "tokens": sum(len(file.ids) for file in self.training),
            "digest": self.digest,
            "tokenizer": self.tokenizer.digest,
            "dedup": [found for file in self.training for source in file.sources if (found := _dedup(source))],
            "corpora": [_about(file) | {"share": share} for file, share in zip(self.training, shares, strict=True)],
            "validation": [_about(file) for file in self.validation],
        }


def _dedup(source: str) -> dict[str, Any] | None:
    """What ``trainer.data.dedup`` says of the folder that it has written; None for other sources.

    Raises:
        UserError: it is not JSON.
    """
    path = Path(source, "dedup.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON. Remove it, or write the folder again: {error}") from error
    return {"source": source, **{name: value for name, value in found.items() if name != "seconds"}}


def _about(file: TokenFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "sources": file.sources,
        "files": list(file.files) if len(file.files) <= _MOST_FILES else None,
        "tokens": len(file.ids),
        "documents": len(file.bounds) - 1,
        "digest": file.digest,
        "corrupt_lines": len(file.corrupt_lines),
    }


def load(
    data: Sequence[str],
    valid: Sequence[str],
    tokenizer: Path | None,
    recipe: Recipe,
    grows: Callable[[], None] = lambda: None,
) -> Dataset:
    """Find the data in the cache, or tokenise it.

    Args:
        data: the values of ``--data``.
        valid: the values of ``--valid``.
        tokenizer: its file or folder. None trains one on the training data.
        recipe: for the size of the vocabulary and the limit of corrupt lines.
        grows: called from another thread every few minutes in which tokens were added.

    Raises:
        UserError: data or tokenizer are missing, unreadable or do not fit.
        RuntimeError: a process that makes tokens has died.
    """
    corpora = training_corpora(data)
    to_evaluate = validation_corpora(valid)
    definition = tokens.find(tokenizer, corpora, recipe.model.vocab_size)
    limits = BuildLimits(corrupt_lines=recipe.data.max_corrupt_lines, workers=tokens.usable_cores())
    files = [tokens.load(corpus, definition, limits, grows) for corpus in corpora]
    return Dataset(
        training=files,
        parts=whole_parts([file.number for file in files if file.number]) if len(files) > 1 else [1],
        validation=[tokens.load(corpus, definition, limits, grows) for corpus in to_evaluate],
        tokenizer=definition,
    )
