"""The tokenizer of a run: read from files, or trained on the data and kept in the cache."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opt_ops.contract.files import write_durably
from trainer.data import corpus
from trainer.data.corpus import Corpus, CorruptLine
from trainer.data.tokens import cache
from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The ids of OPT's dictionary.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")

SMALLEST_TRAINED = len(SPECIAL_TOKENS) + 256  # one for each byte


@dataclass(frozen=True, slots=True)
class Definition:
    """A tokenizer: the text of its ``tokenizer.json``, and its number of tokens."""

    text: str
    vocab_size: int

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()


def find(path: Path | None, corpora: Sequence[Corpus], vocab_size: int) -> Definition:
    """Read the tokenizer, or train a byte-level BPE on ``corpora`` unless the cache has it.

    Args:
        path: a ``tokenizer.json``, or a folder with it or with ``vocab.json`` and ``merges.txt``. None trains one.
        corpora: what to train it on. One process reads all of it, so large corpora should come with a tokenizer.
        vocab_size: of the model. All token ids must be below it.

    Raises:
        UserError: text or tokenizer is missing, unreadable or does not fit the model.
    """
    definition = read(path) if path else _trained(corpora, vocab_size)
    require_fits(definition, vocab_size)
    return definition


def require_fits(definition: Definition, vocab_size: int) -> None:
    """Check that all token ids are below the size of the model's vocabulary.

    Raises:
        UserError: they are not.
    """
    if definition.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {definition.vocab_size} tokens but model.vocab_size is {vocab_size}: "
            "raise model.vocab_size or use a smaller tokenizer."
        )


def read(path: Path) -> Definition:
    """Read a tokenizer from its file or folder.

    Raises:
        UserError: there is none, or it is not one for OPT.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    files = _files(path)
    try:
        if len(files) == 1:
            tokenizer = Tokenizer.from_file(str(files[0]))
        else:
            vocab, merges = models.BPE.read_file(str(files[0]), str(files[1]))
            tokenizer = Tokenizer(models.BPE(vocab, merges))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"--tokenizer {files[0]}: not a tokenizer: {error}") from error
    found = tuple(tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
    if found != SPECIAL_TOKENS:
        raise UserError(
            f"--tokenizer {files[0]}: its first tokens are {found}, but the model needs {SPECIAL_TOKENS}. "
            "Use the tokenizer of a released OPT model, or one with these ids."
        )
    return _definition(tokenizer)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        files = [path / name for name in names]
        if all(file.is_file() for file in files):
            return files
    raise UserError(
        f"--tokenizer {path}: expected a tokenizer.json, or a folder with tokenizer.json or vocab.json and merges.txt."
    )


def _trained(corpora: Sequence[Corpus], vocab_size: int) -> Definition:
    files = [file for each in corpora for file in each.files()]
    inputs = [cache.FORMAT, cache.versions(files), vocab_size]
    name = "tokenizer-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    folder = cache.folder()
    path = folder / f"{name}.json"
    if not path.exists():
        with cache.one_builder(folder, name):
            if not path.exists():
                write_durably(path, trained_on(files, vocab_size).text)
    from tokenizers import Tokenizer

    return _definition(Tokenizer.from_file(str(path)))


def trained_on(files: Sequence[Path], vocab_size: int) -> Definition:
    """Train a byte-level BPE on files. It has at least `SMALLEST_TRAINED` tokens, also where ``vocab_size`` is less."""
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
    return _definition(tokenizer)


def _texts(files: Sequence[Path]) -> Iterator[str]:
    """The texts of ``files`` without corrupt lines. Those are reported and counted when the text becomes tokens."""
    for file in files:
        for text in corpus.documents(corpus.whole(file)):
            if not isinstance(text, CorruptLine):
                yield text


def _definition(tokenizer: "Tokenizer") -> Definition:
    return Definition(tokenizer.to_str(), tokenizer.get_vocab_size())
