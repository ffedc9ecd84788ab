"""Counts what the readers of the run folder leave out: by file, with the first and the newest example."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opt_ops.core.text import clean
from opt_ops.ports import LeftOut

log = logging.getLogger(__name__)

_FILES = 64  # of each kind with a count of their own: a neighbour may fill a folder with files
_LONGEST_WHY = 300


class LeftOutCounter:
    """What was left out of the files of one lineage since this daemon process began to read them."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the lineage's: files are named relative to it."""
        self._folder = folder
        self._found: dict[tuple[str, str], LeftOut] = {}
        self._taken: dict[tuple[str, str], int] = {}
        self._unreadable: dict[tuple[str, str], str] = {}

    def left_out(self) -> Sequence[LeftOut]:
        """Return the files of which anything was left out."""
        return [replace(each, taken=self._taken.get(key, 0)) for key, each in self._found.items()]

    def took(self, source: str, path: Path, records: int = 1) -> None:
        """Records of a file were taken."""
        if records:
            key = self._key(source, path)
            self._taken[key] = self._taken.get(key, 0) + records

    def add(self, source: str, path: Path, why: str, line: int = 0) -> None:
        """A record was left out, wholly or in part. `line` is its number, from 1; 0: it has none."""
        key = self._key(source, path)
        example = clean(f"line {line:,}: {why}" if line else why, _LONGEST_WHY)
        before = self._found.get(key)
        if before is None:
            log.warning("%s: left out, because it is not what docs/formats.md says: %s", path, example)
            before = LeftOut(source=source, file=key[1], count=0, taken=0, first=example, newest=example)
        self._found[key] = replace(before, count=before.count + 1, newest=example)

    def unreadable(self, source: str, path: Path, error: Exception) -> None:
        """A file cannot be read. It is tried again, and counted once for each reason."""
        why = getattr(error, "strerror", None) or str(error)
        key = self._key(source, path)
        if self._unreadable.get(key) != why:
            self._unreadable[key] = why
            self.add(source, path, f"the file cannot be read: {why}")

    def _key(self, source: str, path: Path) -> tuple[str, str]:
        name = str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else path.name
        key = (source, clean(name, _LONGEST_WHY))
        if key not in self._found and sum(known == source for known, _ in self._found) >= _FILES:
            return source, "other files"
        return key
