"""``--check``: what training would refuse before its first step. It imports no torch, reads little, writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opt_ops.contract import manifest
from opt_ops.contract.data_since import by_step
from trainer import preconditions
from trainer.data import corpus
from trainer.data.changes import first_samples
from trainer.data.corpus import Corpus, Span
from trainer.data.lines import CorruptLine, named
from trainer.errors import UserError
from trainer.recipes import Recipe

if TYPE_CHECKING:
    from trainer.data.tokens.tokenizer import Definition

_READ_BYTES = 1 << 20  # of each corpus: some hundred documents, in well below a second
_EXACT_BYTES_PER_TOKEN = 64  # a corpus with more bytes for each token of a sample is taken to be long enough


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The first lines of a corpus."""

    corpus: Corpus
    files: Sequence[Path]
    size: int
    documents: int
    text_bytes: int
    corrupt: Sequence[CorruptLine]

    @property
    def whole(self) -> bool:
        """Whether that is all of it."""
        return self.size <= _READ_BYTES


def check(
    recipe: Recipe,
    world: int,
    *,
    data: Sequence[str] = (),
    since: Sequence[tuple[int, str]] = (),
    valid: Sequence[str] = (),
    tokenizer: Path | None = None,
    resume: Path | None = None,
    init_from: Path | None = None,
) -> tuple[int, int]:
    """Find what would end training before its first step.

    Args:
        recipe: with all settings.
        world: number of ranks.
        data: the values of ``--data``.
        since: the values of ``--data-since``.
        valid: the values of ``--valid``.
        tokenizer: its file or folder.
        resume: the checkpoint to continue from.
        init_from: the checkpoint with the first weights.

    Returns:
        The layout, (dp, tp).

    Raises:
        UserError: training would refuse it.
        CheckpointError: a checkpoint is missing or damaged, as far as that shows without its shards.
    """
    preconditions.require_packages()
    layout = preconditions.check_layout(recipe, world)
    preconditions.check_engine(recipe)
    for path in filter(None, (resume, init_from if not resume else None)):
        found = manifest.read(path)
        preconditions.require_same_shape(found, recipe, path)
        preconditions.require_same_size(found, recipe, path)
        if path == resume:
            changes = list(by_step(since))
            first_samples(changes, found.step, found.data_position, recipe.data.global_batch, (), found.data_since)
    _check_data(recipe, data, since, valid, tokenizer)
    return layout


def _check_data(
    recipe: Recipe, data: Sequence[str], since: Sequence[tuple[int, str]], valid: Sequence[str], tokenizer: Path | None
) -> None:
    from trainer.data.mixture import whole_parts
    from trainer.data.tokens import tokenizer as tokenizers

    stretches, validation = corpus.training_stretches(data, since), corpus.validation_corpora(valid)
    for _, corpora in stretches:
        if len(corpora) > 1:
            whole_parts([each.number for each in corpora if each.number])
    training = stretches[0][1]
    given = tokenizers.read(tokenizer) if tokenizer else None
    if given:
        tokenizers.require_fits(given, recipe.model.vocab_size)
    elif recipe.model.vocab_size < tokenizers.SMALLEST_TRAINED:
        raise UserError(
            f"model.vocab_size={recipe.model.vocab_size} is less than the {tokenizers.SMALLEST_TRAINED} tokens that "
            "every tokenizer has: raise it."
        )
    begun = [_beginning(each, recipe.data.max_corrupt_lines) for each in training]
    known = set(training)
    later = [each for _, corpora in stretches[1:] for each in corpora if each not in known]
    others = [_beginning(each, recipe.data.max_corrupt_lines) for each in (*dict.fromkeys(later), *validation)]
    need = recipe.data.seq_len + 1
    if not given and all(_is_short(each, need) for each in begun):
        given = tokenizers.trained_on([file for each in begun for file in each.files], recipe.model.vocab_size)
    for each in (*begun, *others):
        _require_length(each, need, given)


def _beginning(each: Corpus, most_corrupt: int) -> _Beginning:
    """Read the first lines. The built-in corpus is not read: its size is known.

    Raises:
        UserError: a file is missing or unreadable, or too many lines are no documents.
    """
    files = each.files()
    sizes = [file.stat().st_size for file in files]
    if not each.paths:
        return _Beginning(each, files, sum(sizes), len(files), sum(sizes), ())
    left, found, size = _READ_BYTES, 0, 0
    corrupt: list[CorruptLine] = []
    for file, whole in zip(files, sizes, strict=True):
        if left <= 0 or (file.suffix in {".py", ".txt"} and whole > _READ_BYTES):  # these are read as a whole
            break
        for text in corpus.documents(Span(file, 0, min(left, whole))):
            if isinstance(text, CorruptLine):
                corrupt.append(text)
            else:
                found, size = found + 1, size + len(text.encode("utf-8", "replace"))
        left -= whole
    if len(corrupt) > most_corrupt:
        raise UserError(
            f"{'; '.join(named(corrupt))}. {each.name} has {len(corrupt)} such lines near its beginning, more than "
            f"data.max_corrupt_lines={most_corrupt}: repair or remove them, or raise the limit to skip them."
        )
    return _Beginning(each, files, sum(sizes), found, size, corrupt)


def _is_short(begun: _Beginning, need: int) -> bool:
    """Whether so little text may be less than one sample of ``need`` tokens."""
    return begun.whole and begun.text_bytes < need * _EXACT_BYTES_PER_TOKEN


def _require_length(begun: _Beginning, need: int, tokenizer: "Definition | None") -> None:
    """Check that a corpus has one sample. Exact for short ones, if the tokenizer is known."""
    if not _is_short(begun, need):
        return
    tokens = begun.text_bytes + begun.documents  # at most: a token has a byte or more, and each document has an end
    if tokens >= need and tokenizer is not None:
        import numpy as np

        from trainer.data.tokens import encode

        spans = [corpus.whole(file) for file in begun.files]
        tokens = len(encode.encode(spans, encode.tokenizer_of(tokenizer.text), np.dtype(np.uint32)).ids)
    if not begun.documents:
        raise UserError(f"{begun.corpus.name}: {begun.corpus.without_text()}")
    if tokens < need:
        raise UserError(
            f"{begun.corpus.name}: the data has {tokens} tokens, less than one sample of {need}: give more --data, or "
            "lower data.seq_len."
        )
