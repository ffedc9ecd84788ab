"""Reads and writes files of the run folder as docs/formats.md says: whole files or none, whole lines only."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from opt_ops.contract.files import sync_folder, write_durably
from opt_ops.errors import OptOpsError


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
        created = _linked(temporary, path)
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return created


_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})


def _linked(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that exists. Returns whether this call did it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may send a call twice when its first answer is lost: the second one finds what the first one has made.
        return path.lstat().st_ino == temporary.lstat().st_ino
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    # A file system without hard links: the name is taken first, and the content comes by rename.
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    write_durably(path, temporary.read_text(encoding="utf-8"))
    return True


LARGEST_FILE = 64 * 1024 * 1024
"""Bytes of a JSON file that is read at once. The largest known are orders for thousands of nodes: some MiB."""
LONGEST_LINE = 8 * 1024 * 1024
"""Bytes of a line. The longest known are heartbeats of nodes with hundreds of mounts: some 100 KiB."""
_PIECE = 1024 * 1024  # bytes that a tail reads at once

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FileRefused(OSError):
    """A file that is not read: it is no regular file, it is too large, or another user can write what we would obey."""


def open_regular(path: Path, *, orders: bool = False) -> int:
    """Open a file for reading if it is a regular file. Returns its descriptor. This never waits for another process.

    Everything that others can put into the run folder is opened here. A named pipe would hold up its reader for ever.

    Args:
        path: the file. A symbolic link to a regular file is followed, unless the file gives orders.
        orders: the file tells its reader what to do, as a request or `orders.json`. It must belong to this user or to
            root, and neither its group nor others may write it.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: it is no regular file, or an untrusted one.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (os.O_NOFOLLOW if orders else 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:
            why = "it is a socket or a device, and must be a regular file"
        elif error.errno == errno.ELOOP and orders:
            why = "it is a symbolic link, and must be a regular file"
        else:
            raise
        raise FileRefused(error.errno, why, str(path)) from error
    if why := _refusal(os.fstat(descriptor), orders):
        os.close(descriptor)
        raise FileRefused(errno.EPERM, why, str(path))
    return descriptor


def _refusal(found: os.stat_result, orders: bool) -> str:
    """Why a file is not read; empty: it may be read."""
    if not stat.S_ISREG(found.st_mode):
        return f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, and must be a regular file"
    if not orders:
        return ""
    if found.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {found.st_uid}, not to this user ({os.geteuid()})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write it (mode {stat.S_IMODE(found.st_mode):o}); chmod go-w makes it trusted"
    return ""


def read_bytes(path: Path, most: int = LARGEST_FILE, *, orders: bool = False) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: it is no regular file, an untrusted one, or larger than `most` bytes.
        OSError: it cannot be read.
    """
    descriptor = open_regular(path, orders=orders)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileRefused(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return data


def read_json(path: Path, most: int = LARGEST_FILE, *, orders: bool = False) -> Any | None:
    """Return the value in a JSON file; None if there is no such file.

    Raises:
        OptOpsError: the file is not JSON. Files are renamed into place, so this is damage, not a race.
        OSError: the file cannot be read, or is refused as in `open_regular`.
    """
    try:
        data = read_bytes(path, most, orders=orders)
    except FileNotFoundError:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OptOpsError(f"{path} is not JSON: {error}", f"restore the file, or mv {path} {path}.damaged") from error


class Tail:
    """Follows a `*.jsonl` file: each call yields the complete lines since the last call.

    A file that was replaced or became shorter is read from its start: an agent starts a new file when it grows large. A
    line that is not a JSON object is skipped, because other trainers write these files, too. `bad_lines` counts them
    and `on_bad` gets each with its number (0: unknown) and the reason. A line longer than `LONGEST_LINE` is one of
    them; it is never held in memory. With `most`, a call that finds more new bytes than that skips the older ones.
    """

    def __init__(
        self,
        path: Path,
        most: int | None = None,
        on_bad: Callable[[int, str], None] = lambda _, __: None,
        parse: Callable[[bytes], Any] = json.loads,
    ) -> None:
        """`parse` makes the value of a line, and raises ValueError or RecursionError where it is not JSON."""
        self._path = path
        self._parse = parse
        self._most = most
        self._on_bad = on_bad
        self._inode = 0
        self._offset = 0
        self._too_long = False  # the offset is within a line that is too long
        self.line = 0
        """Number of the line that was yielded last, from 1; 0 if lines were skipped before it."""
        self._counted = True
        self.bad_lines = 0

    def skip_to_last(self, size: int) -> None:
        """Start at the first whole line in the last `size` bytes, or in a few more if no line ends in these.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            descriptor = open_regular(self._path)
        except FileNotFoundError:
            return
        try:
            found = os.fstat(descriptor)
            self._begin(found.st_ino)
            if found.st_size > size:
                self._jump(descriptor, found.st_size, size)
        finally:
            os.close(descriptor)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the new complete lines, parsed.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            descriptor = open_regular(self._path)  # a new open: network file systems check for changes then
        except FileNotFoundError:
            return
        try:
            found = os.fstat(descriptor)
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._begin(found.st_ino)
            if self._most is not None and found.st_size - self._offset > self._most:
                self._jump(descriptor, found.st_size, self._most)
            for line in self._lines(descriptor, found.st_size):
                if (value := self._parsed(line)) is not None:
                    yield value
        finally:
            os.close(descriptor)

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self.line = inode, 0, 0
        self._too_long, self._counted = False, True

    def _jump(self, descriptor: int, size: int, last: int) -> None:
        """Go on at the first line that begins in the `last` bytes. If none is whole, look further back for one."""
        behind = self._offset
        while True:
            self._offset = max(behind, size - last)
            data = os.pread(descriptor, size - self._offset, self._offset)
            begin, end = data.find(b"\n") + 1, data.rfind(b"\n") + 1
            if begin < end or self._offset == behind or last >= LONGEST_LINE:
                break
            last = min(8 * last, LONGEST_LINE)
        if self._offset > behind:
            self._offset += begin
            self._too_long = self._too_long and not begin
            self._counted, self.line = False, 0

    def _lines(self, descriptor: int, size: int) -> Iterator[bytes]:
        """Yield the whole lines up to `size`. The file is read in pieces, so memory is bounded for any file."""
        rest, at = b"", self._offset
        while at < size and (data := os.pread(descriptor, min(_PIECE, size - at), at)):
            at += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                self._offset += len(line) + 1
                self.line += self._counted
                if self._too_long or len(line) > LONGEST_LINE:
                    self._too_long = False
                    self._bad(f"longer than {LONGEST_LINE:,} bytes")
                elif line.strip():
                    yield line
            if self._too_long or len(rest) > LONGEST_LINE:
                self._too_long, self._offset, rest = True, at, b""

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            value = self._parse(line)
        except (ValueError, RecursionError) as error:
            self._bad(f"not JSON: {error}")
            return None
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        self._bad("not a JSON object")
        return None

    def _bad(self, why: str) -> None:
        self.bad_lines += 1
        self._on_bad(self.line, why)


def names_in(folder: Path, ending: str) -> list[str]:
    """Names of the whole files in a folder with this ending; none if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return [each.name for each in found if each.name.endswith(ending) and not each.name.startswith(".")]
    except FileNotFoundError:
        return []


def folders_in(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders in a folder that have such a name; none if there is no such folder. Links to folders count.

    What cannot be looked at, as a link into a folder of somebody else, is left out: it must not hide the others.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return [folder / each.name for each in found if name.fullmatch(each.name) and _is_folder(each)]
    except FileNotFoundError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Identity of the file's present content; None if there is no such file.

    The file is opened for that, because network file systems check for changes at an open, not at a `stat`.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return found.st_ino, found.st_mtime_ns, found.st_size
