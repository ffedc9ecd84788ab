"""Who may read and write the run folder: this user alone, or a group that may read. See docs/security.md."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opt_ops.errors import OptOpsError, Refused

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_NAMED = 3  # paths in a message


def keep_private(group: str = "") -> int:
    """From now on, what this process creates is for this user alone; with `group`, members may read. Returns the umask.

    Processes that it starts inherit this.
    """
    return os.umask(0o027 if group else 0o077)


def follow_rights_of(folder: Path) -> None:
    """From now on, this process creates files that the same people may read as the folder, and nobody else may write.

    Raises:
        OSError: the folder cannot be read.
    """
    os.umask((~stat.S_IMODE(folder.stat().st_mode) & 0o077) | 0o022)


@contextmanager
def private(group: str = "") -> Iterator[None]:
    """Do so for a while."""
    before = keep_private(group)
    try:
        yield
    finally:
        os.umask(before)


def group_of(folder: Path) -> str:
    """The group that may read a folder; empty: none may.

    Raises:
        OSError: the folder cannot be read.
    """
    found = folder.stat()
    return str(found.st_gid) if found.st_mode & stat.S_IRGRP else ""


def give_to_group(folder: Path, group: str) -> None:
    """Let the members of a group read a new folder and what will be in it.

    Raises:
        OptOpsError: there is no such group, or this user is no member of it.
    """
    try:
        os.chown(folder, -1, grp.getgrnam(group).gr_gid)
        folder.chmod(0o2750)  # setgid: what is created in it is of that group
    except (KeyError, OSError) as error:
        why = f"{folder} cannot be given to group {group}: {error}"
        raise OptOpsError(why, "correct `group` in opt-ops.toml: id -Gn lists your groups") from error


def check_trusted(folder: Path) -> str:
    """Check a folder that orders are read from. Returns a warning if its group may write it; empty: nothing is wrong.

    Raises:
        Refused: everybody may write it, or it belongs to another user.
    """
    found = folder.stat()
    mend = f"chmod go-w {folder}"
    if found.st_uid not in (0, os.geteuid()):
        raise Refused(
            f"{folder} belongs to user {found.st_uid}, not to this user ({os.geteuid()})",
            f"run it as its owner, whom ls -ld {folder} names",
        )
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise Refused(f"everybody may write {folder} (mode {stat.S_IMODE(found.st_mode):o})", mend)
    return f"its group may write {folder}; next: {mend}" if found.st_mode & stat.S_IWGRP else ""


def writable_by_others(runs: Path) -> list[Path]:
    """The files and folders that the group or others may write: the runs folder, its lineages, and what is in these."""
    found: list[Path] = []
    for path in (runs, *_below(runs, levels=3)):
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue  # gone meanwhile
        if mode & _OTHERS_MAY_WRITE and not stat.S_ISLNK(mode):
            found.append(path)
    return found


def in_words(paths: list[Path]) -> str:
    """The first of them, and how many there are."""
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return ", ".join(str(path) for path in paths[:_MOST_NAMED]) + more


def _below(folder: Path, levels: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        yield Path(entry.path)
        if levels > 1 and entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), levels - 1)
