"""Names of the files of a checkpoint: relative paths with ``/`` that cannot lead out of its folder.

The names are checked when they are written and when they are read. A download writes to the names of a manifest, and
that may come from anywhere. A checkpoint may also be copied to a file system that ignores case.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opt_ops.contract.checkpoint.folders import MANIFEST, MARKER, CheckpointError

LONGEST = 1024
"""Bytes of a name in UTF-8. Linux allows 4,096 for a whole path, and the folder's own path needs room, too."""

_RANK_REPORT = re.compile(r"rank-.*\.json")
_SHOWN = 80  # characters of a bad name in a message


def require_names(path: Path, names: Iterable[Any]) -> None:
    """Refuse names that are not names of files in the folder of the checkpoint ``path``.

    Raises:
        CheckpointError: a name is refused, or two names cannot be in one folder. ``why`` says which.
    """
    paths: dict[str, str] = {}  # names and the folders in them, by what a file system sees that ignores case
    files: set[str] = set()
    for name in names:
        if why := problem(name):
            raise CheckpointError(path, f"the file name {ascii(name)[:_SHOWN]} {why}")
        files.add(name)
        parts = name.split("/")
        for prefix in ("/".join(parts[: i + 1]) for i in range(len(parts))):
            other = paths.setdefault(prefix.casefold(), prefix)
            if other != prefix:
                raise CheckpointError(path, f"the names {other!r} and {prefix!r} differ by case only")
    for name in sorted(files):
        parts = name.split("/")
        if folder := next((each for i in range(1, len(parts)) if (each := "/".join(parts[:i])) in files), ""):
            raise CheckpointError(path, f"the name {folder!r} is a file and also the folder of {name!r}")


def problem(name: Any) -> str:
    """Why ``name`` alone cannot be the name of a file in a checkpoint. Empty: it can."""
    if not isinstance(name, str):
        return "is not text"
    if not name:
        return "is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "holds characters that UTF-8 cannot encode"
    if size > LONGEST:
        return f"has {size:,} bytes in UTF-8 (limit {LONGEST:,})"
    return _problem_of_characters(name) or _problem_of_parts(name)


def _problem_of_characters(name: str) -> str:
    if "\0" in name:
        return "holds a NUL character"
    if name.splitlines() != [name]:
        return "holds a line break"
    if "\\" in name:
        return "holds a backslash: parts are separated by /"
    return ""


def _problem_of_parts(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/"):
        return "is absolute: names are relative to the checkpoint's folder"
    if "" in parts:
        return "has an empty part"
    for part in (".", ".."):
        if part in parts:
            return f"has the part {part!r}"
    if MARKER.casefold() in (part.casefold() for part in parts):
        return f"has a part called {MARKER}, which is the name of the marker"
    if parts[0].casefold() == MANIFEST:
        return f"begins with {MANIFEST}, which is the name of the manifest"
    if _RANK_REPORT.fullmatch(parts[0].casefold()):
        return "begins with the name of a rank's report"
    return ""
