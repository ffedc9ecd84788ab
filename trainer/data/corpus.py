"""Where the text comes from: JSON lines, or the prose that every Python installation has on disk."""

import ast
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from trainer.errors import UserError

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"}

# A string constant of at least so many characters, with a blank in every twenty of them, is a docstring or a help text.
_SHORTEST_PROSE = 100
_LONGEST_WORD = 20

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_NUMBERED = re.compile(r"(.+):(\d+|\d*\.\d+)", re.DOTALL)
_NEWLINES_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text under one name.

    Attributes:
        name: in messages, in telemetry and in the configuration.
        paths: JSONL files and folders of them; none for the prose of Python's standard library.
        number: what the command line said behind the colon, or None: a weight of training data, the interval in
            updates of validation data.
    """

    name: str
    paths: tuple[Path, ...] = ()
    number: Fraction | None = None

    def files(self) -> list[Path]:
        """All its files, folders searched to all depths, in a fixed order.

        Raises:
            UserError: a path does not exist, or a folder holds no JSONL.
        """
        return jsonl_files(self.paths) if self.paths else standard_library_files()

    @property
    def sources(self) -> list[str]:
        """For people: where its text came from."""
        return [str(path) for path in self.paths] or ["Python standard library"]


@dataclass(frozen=True, slots=True)
class Span:
    """The lines of a file that begin at the bytes from ``begin`` to before ``end``."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A line that is no document: where, and why."""

    path: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}"


def training_corpora(texts: Sequence[str]) -> list[Corpus]:
    """What ``--data`` says: paths that are one corpus, or ``[NAME=]PATH:WEIGHT``, a corpus each.

    Raises:
        UserError: some have a name or a weight and others do not, a weight is 0, or two have one name.
    """
    if not texts:
        return [Corpus(name="stdlib")]
    parsed = [_parse(text) for text in texts]
    if all(name is None and number is None for name, _, number in parsed):
        return [Corpus(name="data", paths=tuple(path for _, path, _ in parsed))]
    for text, (_, _, number) in zip(texts, parsed, strict=True):
        if not number:
            raise UserError(
                f"--data {text}: corpora that are mixed need a weight above 0 each, for example wiki={texts[0]}:0.3. "
                "Paths without names and weights are one corpus."
            )
    return _named(parsed, "--data")


def validation_corpora(texts: Sequence[str]) -> list[Corpus]:
    """What ``--valid`` says: ``[NAME=]PATH[:EVERY]``, a corpus each.

    Raises:
        UserError: an interval is not a whole number above 0, or two have one name.
    """
    parsed = [_parse(text) for text in texts]
    for text, (_, _, number) in zip(texts, parsed, strict=True):
        if number is not None and (number.denominator != 1 or number < 1):
            raise UserError(f"--valid {text}: expected a whole number of updates, at least 1, behind the colon.")
    return _named(parsed, "--valid")


def _parse(text: str) -> tuple[str | None, Path, Fraction | None]:
    """``[NAME=]PATH[:NUMBER]``; a path that exists is taken for what it is, whatever characters it has."""
    name = number = None
    if not Path(text).exists() and (found := _NAMED.fullmatch(text)):
        name, text = found[1], found[2]
    if not Path(text).exists() and (found := _NUMBERED.fullmatch(text)):
        text, number = found[1], Fraction(found[2])
    return name, Path(text), number


def _named(parsed: Sequence[tuple[str | None, Path, Fraction | None]], option: str) -> list[Corpus]:
    corpora: dict[str, Corpus] = {}
    for name, path, number in parsed:
        corpus = Corpus(name=name or path.stem, paths=(path,), number=number)
        if corpus.name in corpora:
            raise UserError(f"{option}: two corpora are called {corpus.name}: name one of them, other={path}.")
        corpora[corpus.name] = corpus
    return list(corpora.values())


def jsonl_files(paths: Sequence[Path]) -> list[Path]:
    """The JSONL files among ``paths``, folders searched to all depths, in a fixed order.

    Raises:
        UserError: a path does not exist, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder to take text from.")
        found = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
        if not found:
            raise UserError(f"{path}: the folder holds no *.jsonl file to take text from.")
        files += found
    return files


def standard_library_files() -> list[Path]:
    """The files of Python's standard library, for the prose in them: manual, docstrings, licence; about 2 MB of it."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_PROSE)
        files += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    return files


def whole(path: Path) -> Span:
    """All lines of a file."""
    return Span(path, 0, path.stat().st_size)


def documents(span: Span) -> Iterator[str | Corrupt]:
    """The texts in part of a file: of each line (JSONL), of all prose in the string constants (Python), or the whole.

    Blank space at the end of a text is dropped, and so are texts and lines with nothing else.

    Raises:
        UserError: the file cannot be read.
    """
    if span.path.suffix == ".py":
        texts = iter(["\n\n".join(_prose_in_source(span.path))])
    elif span.path.suffix == ".txt":
        texts = iter([span.path.read_text(encoding="utf-8", errors="replace")])
    else:
        texts = _texts_of_lines(span)
    for text in texts:
        if isinstance(text, Corrupt) or (text := text.rstrip()):
            yield text


def _prose_in_source(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if len(text) >= _SHORTEST_PROSE and text.count(" ") * _LONGEST_WORD > len(text):
                yield text.strip()


def _texts_of_lines(span: Span) -> Iterator[str | Corrupt]:
    try:
        with span.path.open("rb") as file:
            position = span.begin
            if position:
                file.seek(position - 1)
                position += len(file.readline()) - 1  # the line that the byte before belongs to is not ours
            before = None
            for number, line in enumerate(file):
                if position >= span.end:
                    return
                position += len(line)
                text = _text_of(line) if not line.isspace() else ""
                if text is None:
                    if before is None:
                        before = _newlines(span.path, position - len(line)) - number
                    why = 'not a JSON object with a string "text" in UTF-8'
                    yield Corrupt(str(span.path), before + number + 1, why)
                else:
                    yield text
    except OSError as error:
        raise UserError(f"{span.path} cannot be read: {error.strerror}.") from error


def _text_of(line: bytes) -> str | None:
    try:
        text = json.loads(line)["text"]
        text.encode()  # half of a surrogate pair is a str, but no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def _newlines(path: Path, end: int) -> int:
    """How many lines end before the byte ``end``."""
    count = 0
    with path.open("rb") as file:
        while chunk := file.read(min(_NEWLINES_AT_ONCE, end - file.tell())):
            count += chunk.count(b"\n")
    return count
