"""Whether the folder of the lineage is still there: an agent of a lineage that was deleted or renamed must leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

GONE_SECONDS = 10.0
"""The folder is gone, but the runs folder is as it was: somebody has deleted or renamed it."""

UNMOUNTED_SECONDS = 180.0
"""The runs folder is gone as well, or the folder was never seen: a file system that fails must not end training."""

_Identity = tuple[int, int]
UNKNOWN = (-1, -1)


class FolderWatch:
    """Compares the folder with the one that the agent began in."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._mine = _identity(folder)
        self._parent = _identity(folder.parent)
        self._missed_since: float | None = None
        self.here = self._mine is not None
        """Whether the folder was there at the last look. Nothing is written while it is not."""

    def is_gone(self) -> bool:
        """Look at the folder. Returns whether it has been gone for so long that it will not come back."""
        now, parent = _identity(self._folder), _identity(self._folder.parent)
        if UNKNOWN in (now, parent):
            return False
        if self._mine in (None, UNKNOWN):
            self._mine, self._parent = now, parent
        self.here = now is not None and now == self._mine
        if self.here:
            self._missed_since = None
            return False
        self._missed_since = self._clock() if self._missed_since is None else self._missed_since
        removed = self._mine is not None and self._parent == parent
        return self._clock() - self._missed_since >= (GONE_SECONDS if removed else UNMOUNTED_SECONDS)


def _identity(folder: Path) -> _Identity | None:
    """Device and inode; None if there is no such folder."""
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # a network file system does not answer: that says nothing
        return UNKNOWN
    return found.st_dev, found.st_ino
