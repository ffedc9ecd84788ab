"""Where the text comes from: JSON lines, or the prose that every Python installation has on disk."""

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.errors import UserError

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"}

# A string constant of at least so many characters, with a blank in every twenty of them, is a docstring or a help text.
_SHORTEST_PROSE = 100
_LONGEST_WORD = 20


def jsonl_files(paths: Sequence[Path]) -> list[Path]:
    """The JSONL files among ``paths``, folders searched to all depths, in a fixed order.

    Raises:
        UserError: a path does not exist, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--data {path}: no such file or folder.")
        found = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
        if not found:
            raise UserError(f"--data {path}: the folder holds no *.jsonl file.")
        files += found
    return files


def standard_library_files() -> list[Path]:
    """The files of Python's standard library, for the prose in them: manual, docstrings, licence; about 2 MB of it."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_PROSE)
        files += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    return files


def documents(path: Path) -> Iterator[str]:
    """The texts in one file: of each line (JSONL), of all prose in the string constants (Python), or the whole.

    Raises:
        UserError: a line is not a JSON object with a ``text``, or a file cannot be read.
    """
    if path.suffix == ".py":
        yield "\n\n".join(_prose_in_source(path))
    elif path.suffix == ".txt":
        yield path.read_text(encoding="utf-8", errors="replace")
    else:
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"--data {path} cannot be read: {error.strerror}.") from error
        with file:
            for number, line in enumerate(file, start=1):
                yield _text_of(line, path, number)


def _prose_in_source(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if len(text) >= _SHORTEST_PROSE and text.count(" ") * _LONGEST_WORD > len(text):
                yield text.strip()


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{path}:{number}: not a JSON object with a string "text". Mend or remove the line.')
    return text
