"""Reads and writes files of the run folder as docs/formats.md says: whole files or none, whole lines only."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_ops.contract.files import sync_folder, write_durably
from opt_ops.errors import OptOpsError

log = logging.getLogger(__name__)

NOT_AS_PROMISED = (KeyError, TypeError, ValueError, AttributeError)
"""Errors of a reader when a file is JSON, but not as docs/formats.md says."""
UNREADABLE = (OSError, OptOpsError, *NOT_AS_PROMISED)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`. The file is whole after a crash. Its folder is created if there is none.

    Raises:
        OSError: the file cannot be written. It keeps what it held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON.

    Raises:
        ValueError: the value holds NaN or infinity.
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n")


def create_json(path: Path, value: Any) -> bool:
    """Create `path` with `value`, whole, unless it exists. Returns whether this call created it.

    Raises:
        ValueError: the value holds NaN or infinity.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> Any | None:
    """Return the value in a JSON file; None if there is no such file.

    Raises:
        OptOpsError: the file is not JSON. Files are renamed into place, so this is damage, not a race.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptOpsError(f"{path} is not JSON: {error}", "restore the file, or move it away") from error


class Tail:
    """Follows a `*.jsonl` file: each call yields the complete lines since the last call.

    A file that was replaced or became shorter is read from its start: an agent starts a new file when it grows large. A
    line that is not a JSON object is skipped and counted in `bad_lines`, because other trainers write these files, too.
    With `most`, a call that finds more new bytes than that skips the older ones.
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        self._path = path
        self._most = most
        self._inode = 0
        self._offset = 0
        self.bad_lines = 0

    def skip_to_last(self, size: int) -> None:
        """Start at the first whole line in the last `size` bytes."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        self._inode, self._offset = stat.st_ino, max(0, stat.st_size - size)
        if self._offset:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                self._offset += len(file.readline())

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the new complete lines, parsed.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY)  # a new open: network file systems check for changes then
        except FileNotFoundError:
            return
        try:
            stat = os.fstat(descriptor)
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._inode, self._offset = stat.st_ino, 0
            late = self._most is not None and stat.st_size - self._offset > self._most
            if late:
                self._offset = stat.st_size - (self._most or 0)
            data = os.pread(descriptor, stat.st_size - self._offset, self._offset)
        finally:
            os.close(descriptor)
        begin, end = data.find(b"\n") + 1 if late else 0, data.rfind(b"\n") + 1
        self._offset += end
        for line in data[begin:end].splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            else:
                self.bad_lines += 1


class WarnOnce:
    """Logs a problem once for each file: it must not stop the watch over other files, and must not be hidden."""

    def __init__(self) -> None:
        self._warned: set[Path] = set()

    def add(self, path: Path, error: Exception) -> None:
        """Log the problem, unless the file has a logged one."""
        if path not in self._warned:
            self._warned.add(path)
            log.warning("%s is skipped: it cannot be read, or is not what docs/formats.md says: %r", path, error)


def names_in(folder: Path, ending: str) -> list[str]:
    """Names of the whole files in a folder with this ending; none if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return [each.name for each in found if each.name.endswith(ending) and not each.name.startswith(".")]
    except FileNotFoundError:
        return []


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Identity of the file's present content; None if there is no such file.

    The file is opened for that, because network file systems check for changes at an open, not at a `stat`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        stat = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
