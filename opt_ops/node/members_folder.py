"""The folder of an agent's members files: in the node's memory, else on its own disk, for this agent alone.

Thousands of ranks look at their files every few milliseconds, once they have lost a peer. A shared file system would be
the next thing to fail, and a busy disk takes tenths of a second to write a file. The folder is removed when the agent
ends. What an agent has left that was killed is removed by the next one of this user.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from opt_ops.contract.membership import joining_file, lost_file, ready_file

MEMORY = Path("/dev/shm")  # noqa: S108  (the folder in it has a name that nobody can know, and is private)
STALE_SECONDS = 180.0  # a waiting rank says once a minute that it is ready


class MembersFolder:
    """The files by which this agent and its ranks tell each other who takes part.

    Raises:
        OSError: no folder can be made.
    """

    def __init__(self) -> None:
        prefix, disk = f"opt-ops-members-{os.geteuid()}-", Path(tempfile.gettempdir())
        for left in (*MEMORY.glob(f"{prefix}*"), *disk.glob(f"{prefix}*")):
            _remove_unless_used(left)
        try:
            made = Path(tempfile.mkdtemp(prefix="opt-ops-", dir=MEMORY))  # only this user may read it
        except OSError:  # there is none, or it is full
            made = Path(tempfile.mkdtemp(prefix="opt-ops-", dir=disk))
        self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(prefix + made.name.removeprefix("opt-ops-")))  # others see it locked
        self._count = 0

    def name(self, what: str) -> Path:
        """The path of a new members file. No two processes ever have the same."""
        self._count += 1
        return self.path / f"{what}-{self._count}.json"

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)


def forget(members: Path) -> None:
    """Remove the files of a process that has ended."""
    for path in (members, ready_file(members), lost_file(members), joining_file(members)):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def has_lost_peer(members: Path) -> bool:
    """Whether the rank says that it has lost a peer, since it was last told a newer generation."""
    try:
        said = lost_file(members).stat().st_mtime_ns
    except OSError:
        return False
    try:
        return said > members.stat().st_mtime_ns
    except OSError:  # it was told none yet
        return True


def is_ready(members: Path, now: float) -> bool:
    """Whether the waiting rank says that it is ready. `now`: in seconds since the epoch."""
    try:
        return now - ready_file(members).stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def _remove_unless_used(folder: Path) -> None:
    """Remove the folder of an agent that has ended: it does not hold the lock any more."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # it is being made, or removed
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    finally:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
