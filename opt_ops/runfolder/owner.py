"""The owner of a lineage: one small file beside its journal that names the daemon process which may act.

The file is replaced at a takeover. A daemon opens and reads it before each effect: a network file system checks for
changes at an open, while a listing of a folder may be a minute old.
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import FileRefused, open_regular, read_json, write_json

HIGHEST_EPOCH = 10**15
"""Above every number that daemons reach by counting. A file that names a higher epoch was not written by opt-ops."""
LIFE_SECONDS = 5.0
"""Between two updates of the owner file's time by its owner."""
DEAD_SECONDS = 60.0
"""Without an update after which a daemon that was fenced may take the lineage back: many missed updates."""


class Fenced(OptOpsError):
    """This daemon process does not own the lineage (any more). It must not write or act."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A daemon process that owns a lineage. `token` is different for each takeover."""

    epoch: int
    host: str
    pid: int
    token: str


class OwnerFile:
    """The owner file of one journal folder: `journal.owner.json` beside `journal/`."""

    def __init__(self, journal: Path) -> None:
        self.path = journal.with_name(f"{journal.name}.owner.json")
        self._folder = journal

    def read(self) -> Owner | None:
        """Return the owner; None if there is no such file, or if it is damaged or not trusted.

        Raises:
            OSError: the file cannot be read now.
        """
        try:
            fields = read_json(self.path, orders=True)
        except (OptOpsError, FileRefused):
            return None
        return _owner_of(fields)

    def claim(self, epoch: int) -> Owner:
        """Make this process the owner. Called while `locked`; a process with a higher epoch stays the owner.

        Raises:
            Fenced: a process with a higher epoch was faster.
            OSError: the file cannot be written.
        """
        mine = Owner(epoch=epoch, host=socket.gethostname(), pid=os.getpid(), token=uuid.uuid4().hex)
        before = self.read()
        if before is not None and before.epoch >= epoch:
            raise self._fenced(before, epoch)
        write_json(self.path, {"v": 1, **asdict(mine)})
        self.check(mine)
        return mine

    def check(self, mine: Owner) -> None:
        """Open and read the file, and check that it still names this process.

        Raises:
            Fenced: it does not.
            OSError: the file cannot be read now.
        """
        found = self.read()
        if found != mine:
            raise self._fenced(found, mine.epoch)

    def show_life(self) -> None:
        """Set the file's time, so that a daemon that was fenced sees that the owner lives."""
        os.utime(self.path)

    def last_life(self) -> int | None:
        """Return the file's time in nanoseconds by the clock of its server; None if there is no such file."""
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _fenced(self, found: Owner | None, epoch: int) -> Fenced:
        lineage = self._folder.parent
        if found is None:
            return Fenced(
                f"{self.path} is gone or damaged: epoch {epoch} does not own {lineage}", "opt-ops daemon status"
            )
        return Fenced(
            f"epoch {found.epoch} has taken over {lineage} from epoch {epoch} (host {found.host}, pid {found.pid})",
            "another daemon is running; see opt-ops daemon status",
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, where the file system has locks: two takeovers at once come one after the other."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # NFS has none for folders: of two at once, `check` finds the one who was later
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class OwnerWatch:
    """Looks at the owner of a lineage from which this daemon was fenced, or whose journal it cannot read.

    It compares the file's time with itself only, so the clocks of hosts and of the file server do not matter.
    """

    def __init__(self, journal: Path, now: float) -> None:
        """`now` is monotonic time, as in the methods."""
        self._file, self._since = OwnerFile(journal), now
        self._life: int | None = None
        with suppress(OSError):  # the next look tells
            self._life = self._file.last_life()

    def changed(self) -> bool:
        """Whether the owner has shown life, or was replaced, since this object was made.

        Raises:
            OSError: the file cannot be read now.
        """
        return self._file.last_life() != self._life

    def dead(self, now: float) -> bool:
        """Whether there is no owner, or it has shown no life for `DEAD_SECONDS`.

        Raises:
            OSError: the file cannot be read now.
        """
        life = self._file.last_life()
        if life != self._life:
            self._life, self._since = life, now
        return life is None or now - self._since >= DEAD_SECONDS


def _owner_of(fields: Any) -> Owner | None:
    if not isinstance(fields, dict):
        return None
    found = cast("dict[str, Any]", fields)
    epoch, pid = found.get("epoch"), found.get("pid")
    host, token = found.get("host"), found.get("token")
    if not _whole(epoch) or not _whole(pid) or not isinstance(host, str) or not isinstance(token, str):
        return None
    return Owner(epoch=cast("int", epoch), host=host, pid=cast("int", pid), token=token)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= HIGHEST_EPOCH
