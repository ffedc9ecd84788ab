"""What an attempt has recorded of its data, and whether the data is still the same."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import tokens
from trainer.data.corpus import Corpus, training_stretches
from trainer.data.dataset import Dataset, Training, training
from trainer.data.tokens import BuildLimits, Definition
from trainer.data.tokens.encode import tokenizer_of
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """The configuration of an attempt, as far as it decides which tokens a sample has.

    Attributes:
        path: of ``config.json``.
        settings: of the recipe.
        data: the field ``data``: corpora and digests.
        tokenizer: that the data was tokenised with.
    """

    path: Path
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    tokenizer: Definition

    @property
    def seq_len(self) -> int:
        """Tokens that a sample predicts."""
        return self.settings["data"]["seq_len"]

    @property
    def stretches(self) -> list[Mapping[str, Any]]:
        """What was trained on after each step at which it changed, from step 0 on: step, digest, corpora."""
        whole = {"step": 0, "digest": self.data["digest"], "corpora": self.data["corpora"]}
        return self.data.get("since") or [whole]

    @property
    def firsts(self) -> list[int]:
        """For each change of the data, the sample with which it begins."""
        return [each["first_sample"] for each in self.stretches[1:]]


def read(path: Path) -> Recorded:
    """Read ``config.json`` of an attempt, and the tokenizer beside it.

    Raises:
        UserError: one of them is missing or is not what this trainer writes.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = path.with_name("tokenizer.json").read_text(encoding="utf-8")
        definition = Definition(text, tokenizer_of(text).get_vocab_size())
        recorded = Recorded(path=path, settings=config["settings"], data=config["data"], tokenizer=definition)
        expected = [corpus["digest"] for each in recorded.stretches for corpus in each["corpora"]]
        expected += [each["step"] for each in recorded.stretches] + recorded.firsts
        shape = recorded.seq_len, recorded.settings["seed"], recorded.settings["data"]["max_corrupt_lines"]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an attempt of this trainer: no {error}.") from error
    if not (expected and all(isinstance(each, int) for each in shape)):
        raise UserError(f"{path} does not name the corpora and sizes of an attempt of this trainer.")
    if definition.digest != recorded.data["tokenizer"]:
        raise UserError(
            f"{path.with_name('tokenizer.json')} has changed since the attempt began: its digest was "
            f"{recorded.data['tokenizer']}, and is {definition.digest} now."
        )
    return recorded


def load(
    recorded: Recorded, data: Sequence[str], since: Sequence[tuple[int, str]] = ()
) -> tuple[Dataset, list[list[Path]]]:
    """The data of the attempt, and the files of each corpus. What is not in the cache is tokenised again.

    Args:
        recorded: what the attempt was trained on.
        data: the values of ``--data``.
        since: the values of ``--data-since``.

    Raises:
        UserError: a file is gone, or the data is not what the attempt was trained on. The message has both digests.
        RuntimeError: a process that makes tokens has died.
    """
    stretches = training_stretches(data, since)
    if [step for step, _ in stretches] != [each["step"] for each in recorded.stretches]:
        raise UserError(f"--data-since has other steps than the changes of the data in {recorded.path}.")
    for (_, corpora), was in zip(stretches, recorded.stretches, strict=True):
        if len(corpora) != len(was["corpora"]):
            raise UserError(f"--data names {len(corpora)} corpora, and {recorded.path} names {len(was['corpora'])}.")
        for corpus, before in zip(corpora, was["corpora"], strict=True):
            _require_files(corpus, before)
    limits = BuildLimits(corrupt_lines=recorded.settings["data"]["max_corrupt_lines"], workers=tokens.usable_cores())
    found = Dataset(
        training=[
            _training(recorded, was, corpora, limits)
            for (_, corpora), was in zip(stretches, recorded.stretches, strict=True)
        ],
        validation=[],
        tokenizer=recorded.tokenizer,
    )
    files = {
        (file.name, file.digest): corpus.files()
        for (_, corpora), each in zip(stretches, found.training, strict=True)
        for corpus, file in zip(corpora, each.files, strict=True)
    }
    return found, [files[file.name, file.digest] for file in found.corpora]


def _training(recorded: Recorded, was: Mapping[str, Any], corpora: Sequence[Corpus], limits: BuildLimits) -> Training:
    files = []
    for corpus, before in zip(corpora, was["corpora"], strict=True):
        try:
            file = tokens.load(corpus, recorded.tokenizer, limits)
        except UserError as error:
            raise UserError(f"{_changed(corpus, before)} and cannot be tokenised now: {error}") from error
        if file.digest != before["digest"]:
            raise UserError(f"{_changed(corpus, before)} and is {file.digest} now. Restore the file as it was.")
        files.append(file)
    found = training(was["step"], files)
    if found.digest != was["digest"]:
        raise UserError(
            f"the order of the data is another one than in {recorded.path}: its digest was {was['digest']}, "
            f"and is {found.digest} now. Either the weights of --data or the version of the trainer differ."
        )
    return found


def _require_files(corpus: Corpus, before: Mapping[str, Any]) -> None:
    """Check that all files of a corpus are there.

    Raises:
        UserError: one is gone.
    """
    for path in [*corpus.paths, *(Path(name) for name, *_ in before.get("files") or () if corpus.paths)]:
        if not path.exists():
            raise UserError(
                f"{path} is gone: the digest of corpus {corpus.name} was {before['digest']}, and there is none now. "
                "Restore the file as it was."
            )


def _changed(corpus: Corpus, before: Mapping[str, Any]) -> str:
    """``FILE has changed …: the digest of corpus NAME was X``: the files that differ, else all that it was given as."""
    known = {name: tuple(rest) for name, *rest in before.get("files") or ()}
    now = {str(path.resolve()): (path.stat().st_size, path.stat().st_mtime_ns) for path in corpus.files()}
    names = [name for name in now if known and known.get(name) != now[name]] or corpus.sources
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more} changed after the step was trained: the digest of corpus {corpus.name} was "
        + (before["digest"])
    )
