"""The text to train on: JSON lines, or the texts in Python's standard library."""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from opt_ops.contract.data_since import by_step
from trainer.data import content
from trainer.data.lines import CorruptLine, text_of
from trainer.errors import UserError

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"}

# A string constant of at least this length, with a blank in every twenty characters, is a docstring or a help text.
_SHORTEST_PROSE = 100
_LONGEST_WORD = 20

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_NUMBERED = re.compile(r"(.+):(\d+|\d*\.\d+)", re.DOTALL)
_NEWLINES_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text under one name.

    Attributes:
        name: for messages, telemetry and configuration.
        paths: JSONL files and folders of them. Empty for the texts of Python's standard library.
        number: the number after the colon on the command line, or None. For training data it is the weight, for
            validation data the interval in updates.
    """

    name: str
    paths: tuple[Path, ...] = ()
    number: Fraction | None = None

    def files(self) -> list[Path]:
        """All files of the corpus, in a fixed order. Folders are searched recursively.

        Raises:
            UserError: a path does not exist, or a folder holds no JSONL file.
        """
        return jsonl_files(self.paths) if self.paths else standard_library_files()

    def without_text(self) -> str:
        """What to tell about a corpus in which no text was found."""
        files = self.files()
        names = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")
        if not any(file.stat().st_size for file in files):
            return f"{names}: no text, because {'the file is' if len(files) == 1 else 'the files are'} empty (0 bytes)."
        return f'{names}: no text. No line is a JSON object with a "text" that is not blank.'

    @property
    def sources(self) -> list[str]:
        """The sources of the text, as ``config.json`` lists them."""
        return [str(path) for path in self.paths] or ["Python standard library"]


@dataclass(frozen=True, slots=True)
class Span:
    """The lines of a file that begin at a byte from ``begin`` up to, but not including, ``end``."""

    path: Path
    begin: int
    end: int


def training_corpora(texts: Sequence[str]) -> list[Corpus]:
    """The corpora of ``--data``. Plain paths are one corpus. Each ``[NAME=]PATH:WEIGHT`` is a corpus of its own.

    A corpus that is alone and has a name needs no weight.

    Raises:
        UserError: only some have a weight, a weight is 0, or two have the same name.
    """
    if not texts:
        return [Corpus(name="stdlib")]
    parsed = [_parse(text) for text in texts]
    if all(name is None and number is None for name, _, number in parsed):
        return [Corpus(name="data", paths=tuple(path for _, path, _ in parsed))]
    if len(parsed) == 1 and parsed[0][2] is None:
        parsed = [(*parsed[0][:2], Fraction(1))]
    for text, (name, path, number) in zip(texts, parsed, strict=True):
        before, colon, behind = str(path).rpartition(":")
        if colon and not path.exists() and Path(before).exists():
            raise UserError(f"--data {text}: {behind!r} is no weight. Write a number above 0 in digits, such as 0.3.")
        if not number:
            raise UserError(
                f"--data {text}: each corpus of a mixture needs a weight above 0, for example "
                f"{name or path.stem or 'wiki'}={path}:0.3. "
                "Paths without names and weights are one corpus."
            )
    return _named(parsed, "--data")


def training_stretches(data: Sequence[str], since: Sequence[tuple[int, str]] = ()) -> list[tuple[int, list[Corpus]]]:
    """What to train on after each step at which it changes, from step 0 on.

    Args:
        data: the values of ``--data``.
        since: the values of ``--data-since``.

    Raises:
        UserError: values do not fit together.
    """
    found = [(0, training_corpora(data))]
    for step, corpora in by_step(since).items():
        try:
            found.append((step, training_corpora(corpora)))
        except UserError as error:
            raise UserError(f"the data after step {step}: {error}") from error
    return found


def validation_corpora(texts: Sequence[str]) -> list[Corpus]:
    """The corpora of ``--valid``. Each ``[NAME=]PATH[:EVERY]`` is a corpus of its own.

    Raises:
        UserError: an interval is not a whole number above 0, or two have the same name.
    """
    parsed = [_parse(text) for text in texts]
    for text, (_, _, number) in zip(texts, parsed, strict=True):
        if number is not None and (number.denominator != 1 or number < 1):
            raise UserError(f"--valid {text}: expected a whole number of updates, at least 1, after the colon.")
    return _named(parsed, "--valid")


def _parse(text: str) -> tuple[str | None, Path, Fraction | None]:
    """Split ``[NAME=]PATH[:NUMBER]``. A text that is an existing path is taken as a path, whatever it contains."""
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
            raise UserError(f"{option}: two corpora have the name {corpus.name}: give one another name: other={path}.")
        corpora[corpus.name] = corpus
    return list(corpora.values())


def jsonl_files(paths: Sequence[Path]) -> list[Path]:
    """The JSONL files among ``paths``, in a fixed order. Folders are searched recursively.

    Raises:
        UserError: a path does not exist, is a device or a pipe, or is a folder without a JSONL file.
        OSError: a path or folder cannot be looked at.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder. Give a *.jsonl file, or a folder of such files.")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a file nor a folder. Give a *.jsonl file, or a folder of such files.")
        found = [path] if path.is_file() else _below(path)
        if not found:
            raise UserError(f"{path}: the folder holds no *.jsonl file.{content.other_endings(path)}")
        files += found
    return files


def _below(folder: Path) -> list[Path]:
    """All JSONL files below a folder. One that cannot be read is refused: without it, the data would be other data."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse)
    return sorted(Path(here, name) for here, _, names in walk for name in names if name.endswith(".jsonl"))


def standard_library_files() -> list[Path]:
    """The files of Python's standard library that hold texts: manual, docstrings, licence. About 2 MB of text."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_PROSE)
        files += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    return files


def whole(path: Path) -> Span:
    """All lines of a file.

    Raises:
        OSError: the file does not exist.
    """
    return Span(path, 0, path.stat().st_size)


@dataclass(frozen=True, slots=True)
class Document:
    """A text of a corpus, and where it is.

    Attributes:
        text: without the blank space at its end.
        offset: the byte of the file at which its line begins.
    """

    text: str
    offset: int


def documents(span: Span) -> Iterator[str | CorruptLine]:
    """The texts in part of a file.

    A file ``*.txt`` is one. In Python source, ``*.py``, all long string constants together are one. In any other file
    each line is one, a JSON object. Blank space at the end of a text is dropped. Texts and lines without anything else
    are skipped.

    Raises:
        UserError: the file cannot be read, or it holds something else.
    """
    for each in located(span):
        yield each.text if isinstance(each, Document) else each


def located(span: Span) -> Iterator[Document | CorruptLine]:
    """The same texts, each with its place in the file.

    Raises:
        UserError: the file cannot be read, or it holds something else.
    """
    try:
        for each in _found_in(span):
            if isinstance(each, CorruptLine):
                yield each
            elif text := each.text.rstrip():
                yield Document(text, each.offset)
    except OSError as error:
        raise UserError(f"{span.path} cannot be read: {error.strerror}.") from error


def _found_in(span: Span) -> Iterator[Document | CorruptLine]:
    if span.path.suffix == ".py":
        yield Document("\n\n".join(_prose_in_source(span.path)), 0)
    elif span.path.suffix == ".txt":
        yield Document(_prose(span.path), 0)
    else:
        if span.begin == 0:
            content.require_lines(span.path)
        yield from _texts_of_lines(span)


def _prose(path: Path) -> str:
    content.require_prose(path)
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.is_relative_to(sysconfig.get_path("stdlib")):
            return raw.decode("utf-8", "replace")  # nobody can be asked to repair a file of Python itself
        line = raw.count(b"\n", 0, error.start) + 1
        command = content.conversion_of(raw)
        cure = f" Convert it: {command} {content.quoted(path)} > {content.quoted(path, '.utf8.txt')}" if command else ""
        raise UserError(f"{path}:{line}: not UTF-8, probably {content.encoding_of(raw)}.{cure}") from error


def _prose_in_source(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some files have invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not Python source: {error}. Give text as *.txt or *.jsonl.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if len(text) >= _SHORTEST_PROSE and text.count(" ") * _LONGEST_WORD > len(text):
                yield text.strip()


def _texts_of_lines(span: Span) -> Iterator[Document | CorruptLine]:
    with span.path.open("rb") as file:
        position = span.begin
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # a line that begins before the span belongs to the span before
        before = None
        for number, line in enumerate(file):
            if position >= span.end:
                return
            position += len(line)
            text, why = text_of(line) if not line.isspace() else ("", "")
            if text is None:
                if before is None:
                    before = newlines(span.path, 0, position - len(line)) - number
                yield CorruptLine(str(span.path), before + number + 1, why)
            else:
                yield Document(text, position - len(line))


def newlines(path: Path, begin: int, end: int) -> int:
    """The number of lines that end in the bytes from ``begin`` up to, but not including, ``end``.

    Raises:
        OSError: the file cannot be read.
    """
    count = 0
    with path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(min(_NEWLINES_AT_ONCE, end - file.tell())):
            count += chunk.count(b"\n")
    return count
