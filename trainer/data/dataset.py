"""The data of a run: training corpora and their mixture, validation corpora, tokenizer."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import tokens
from trainer.data.corpus import training_stretches, validation_corpora
from trainer.data.mixture import whole_parts
from trainer.data.samples import ORDER, Mixture, Samples, Stretch
from trainer.data.tokens import BuildLimits, Definition, TokenFile, cache
from trainer.errors import UserError
from trainer.hashing import key
from trainer.recipes import Recipe

_LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors that come again on any node. Others, as of a disk or a network, may not."""

_MOST_FILES = 256  # of a corpus, that config.json names one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is trained on from a step on.

    Attributes:
        step: after which it is trained on; 0 for the data that training begins with.
        files: the corpora.
        parts: the share of each, in whole numbers.
    """

    step: int = 0
    files: Sequence[TokenFile]
    parts: Sequence[int]

    @property
    def digest(self) -> str:
        """SHA-256 over everything that, with sizes and seed, decides which tokens a sample has."""
        return _digest([ORDER, self.mixed])

    @property
    def mixed(self) -> list[list[Any]]:
        """The share and the digest of each corpus."""
        return [[part, file.digest] for part, file in zip(self.parts, self.files, strict=True)]

    def about(self) -> list[dict[str, Any]]:
        """Its corpora for ``config.json``."""
        shares = [part / sum(self.parts) for part in self.parts]
        return [_about(file) | {"share": share} for file, share in zip(self.files, shares, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Tokenised corpora.

    Attributes:
        training: what to train on: from the beginning, and then from each step on at which it changes.
        validation: corpora to evaluate on. Their ``number`` is the interval.
        tokenizer: of all corpora.
    """

    training: Sequence[Training]
    validation: Sequence[TokenFile]
    tokenizer: Definition

    @property
    def digest(self) -> str:
        """SHA-256 over everything that, with sizes and seed, decides which tokens a sample has."""
        first, *later = self.training
        return _digest([ORDER, first.mixed, *([each.step, each.mixed] for each in later)])

    @property
    def validation_digest(self) -> str:
        """SHA-256 over the validation data and its intervals."""
        return _digest([[file.name, str(file.number), file.digest] for file in self.validation])

    @property
    def changes(self) -> list[int]:
        """The steps after which other data is trained on, ascending."""
        return [each.step for each in self.training[1:]]

    @property
    def corpora(self) -> list[TokenFile]:
        """All training corpora, each once. One is the same across a change if it has the same name and digest."""
        return list({(file.name, file.digest): file for each in self.training for file in each.files}.values())

    def samples(self, seq_len: int, seed: int, firsts: Sequence[int] = ()) -> Mixture:
        """The samples to train on.

        Args:
            seq_len: tokens that a sample predicts.
            seed: decides the order.
            firsts: for each change of the data, the sample with which it begins. Without one, a change is left out.

        Raises:
            UserError: a corpus is shorter than one sample.
        """
        known = {(file.name, file.digest): index for index, file in enumerate(self.corpora)}
        corpora = []
        for index, file in enumerate(self.corpora):
            try:
                corpora.append(Samples(file.ids, seq_len, key(seed, index), file.bounds))
            except UserError as error:
                raise UserError(f"{file.name}: {error}") from error
        first, *later = self.training
        return Mixture(
            corpora,
            first.parts,
            [
                Stretch(begins, [known[file.name, file.digest] for file in each.files], each.parts)
                for begins, each in zip(firsts, later, strict=False)
            ],
        )

    def at(self, step: int) -> Training:
        """What the update after ``step`` is trained on."""
        return [each for each in self.training if each.step <= step][-1]

    def about(self, step: int = 0, firsts: Sequence[int] = ()) -> dict[str, Any]:
        """The description for ``config.json``: what the update after ``step`` is trained on, and all changes.

        Args:
            step: after which the attempt begins.
            firsts: for each change of the data, the sample with which it begins.
        """
        present = self.at(step)
        files = present.files
        everything = [source for file in self.corpora for source in file.sources]
        told = {
            "sources": [source for file in files for source in file.sources],
            "tokens": sum(len(file.ids) for file in files),
            "digest": present.digest,
            "tokenizer": self.tokenizer.digest,
            "dedup": [found for source in dict.fromkeys(everything) if (found := _dedup(source))],
            "corpora": present.about(),
            "validation": [_about(file) for file in self.validation],
        }
        if firsts:
            told["since"] = [
                {"step": each.step, "digest": each.digest, "first_sample": first, "corpora": each.about()}
                for each, first in zip(self.training, (0, *firsts), strict=True)
            ]
        return told


def _digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value).encode()).hexdigest()


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
    since: Sequence[tuple[int, str]] = (),
) -> Dataset:
    """Find the data in the cache, or tokenise it.

    Args:
        data: the values of ``--data``.
        valid: the values of ``--valid``.
        tokenizer: its file or folder. None trains one on the data that training begins with.
        recipe: for the size of the vocabulary and the limit of corrupt lines.
        grows: called from another thread every few minutes in which tokens were added.
        since: the values of ``--data-since``.

    Raises:
        UserError: data or tokenizer are missing, unreadable or do not fit.
        RuntimeError: a process that makes tokens has died.
    """
    with _lasting_refused():
        stretches = training_stretches(data, since)
        to_evaluate = validation_corpora(valid)
        definition = tokens.find(tokenizer, stretches[0][1], recipe.model.vocab_size)
        limits = BuildLimits(corrupt_lines=recipe.data.max_corrupt_lines, workers=tokens.usable_cores())
        return Dataset(
            training=[
                training(step, [tokens.load(corpus, definition, limits, grows) for corpus in corpora])
                for step, corpora in stretches
            ],
            validation=[tokens.load(corpus, definition, limits, grows) for corpus in to_evaluate],
            tokenizer=definition,
        )


@contextmanager
def _lasting_refused() -> Iterator[None]:
    """Turn an error about a file of the data that a retry would meet again into a UserError.

    Files of the token cache are built again, so a process that has lost one ends with a code after which it is retried.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _LASTING or not isinstance(error.filename, str | Path):
            raise
        if Path(error.filename).is_relative_to(cache.folder()):
            raise
        raise UserError(
            f"{error.filename}: {error.strerror}. Give the data back, or let the user of the training read it: it goes "
            "on from its newest checkpoint."
        ) from error


def training(step: int, files: Sequence[TokenFile]) -> Training:
    """What is trained on after ``step``: tokenised corpora, with the shares that follow from their weights."""
    parts = whole_parts([file.number for file in files if file.number]) if len(files) > 1 else [1]
    return Training(step=step, files=files, parts=parts)
