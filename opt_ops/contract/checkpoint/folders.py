"""Where checkpoints lie, which of them have the marker, what is in them, and how they are pinned and removed."""

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from opt_ops.contract.files import open_append, read_regular, sync_folder, write_durably

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
CheckpointKind = Literal["step", "snapshot"]

_FOLDER = re.compile(r"(step|snapshot)-([0-9]{8,18})")
_LARGEST_PIN = 1 << 20  # bytes
_REPORT = re.compile(r"rank-[0-9]{4,}\.json|\.rank-[0-9]{4,}\.json\.[0-9.]+\.tmp")
"""A report of a rank. NFS may still list the temporary name that it had while it was written."""


class CheckpointError(Exception):
    """A checkpoint is missing, torn or damaged. Exit code 65.

    Attributes:
        path: the checkpoint.
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def step_folder(folder: Path, step: int) -> Path:
    """The path of the durable checkpoint of ``step``."""
    return folder / f"step-{step:08d}"


def snapshot_folder(folder: Path, step: int) -> Path:
    """The path of the snapshot of ``step``: in the run's folder for its manifest, in a node's folder for its shards."""
    return folder / f"snapshot-{step:08d}"


def step_in_name(path: Path) -> int | None:
    """The step that the name of a checkpoint's folder gives. None: it is not named like a checkpoint."""
    name = _FOLDER.fullmatch(path.name)
    return int(name[2]) if name else None


def committed(folder: Path, kind: CheckpointKind = "step") -> list[tuple[int, Path]]:
    """The checkpoints of one kind in ``folder`` that have the marker, as (step, path), newest last. Reads no content.

    Raises:
        OSError: the folder cannot be read.
    """
    return [(step, path) for step, path in folders(folder, kind) if (path / MARKER).exists()]


def folders(folder: Path, kind: CheckpointKind) -> list[tuple[int, Path]]:
    """The same, with or without the marker."""
    if not folder.is_dir():
        return []
    found = ((_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[2]), path) for name, path in found if name and name[1] == kind)


def earlier(path: Path, step: int) -> list[tuple[int, Path]]:
    """The committed checkpoints of both kinds beside ``path``, of steps before ``step``, newest last."""
    if step_in_name(path) is None:
        return []
    found = committed(path.parent, "step") + committed(path.parent, "snapshot")
    return sorted(each for each in found if each[0] < step)


def rank_file(path: Path, rank: int) -> Path:
    """The report of ``rank`` in the checkpoint ``path``."""
    return path / f"rank-{rank:04d}.json"


def shards_in(path: Path) -> set[str]:
    """The files in the folder ``path`` and in its subfolders, without manifest, marker and reports of ranks.

    Raises:
        CheckpointError: there is a symbolic link in it. What a link shows can change without the checkpoint.
        OSError: a folder cannot be read.
    """
    files: set[str] = set()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(path / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_symlink():
                    raise CheckpointError(path, about_link(path, name))
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                elif not (name in (MANIFEST, MARKER) or _REPORT.fullmatch(name)):
                    files.add(name)
    return files


def folders_of(folder: Path, name: str) -> list[Path]:
    """The folders inside ``folder`` that the path ``name`` leads through, the deepest first."""
    return list((folder / name).parents[: name.count("/")])


def link_on_the_way(folder: Path, name: str) -> str:
    """The first part of the path ``name`` in ``folder`` that is a symbolic link. Empty: there is none."""
    parts = name.split("/")
    prefixes = ("/".join(parts[: i + 1]) for i in range(len(parts)))
    return next((prefix for prefix in prefixes if (folder / prefix).is_symlink()), "")


def about_link(folder: Path, name: str) -> str:
    """A sentence about the symbolic link ``name`` in ``folder``."""
    inside = (folder / name).resolve().is_relative_to(folder.resolve())
    what = "a symbolic link" if inside else "a symbolic link that leads out of the folder"
    return f"{shown(name)} is {what}: a checkpoint holds its files themselves"


def shown(name: str) -> str:
    """A name of a file as a message shows it: escaped where it holds characters that cannot be printed."""
    return name if name.isprintable() else ascii(name)


def pin(path: Path, holder: str = "") -> None:
    """Protect the checkpoint ``path`` from pruning: create a file ``<path>.pinned`` beside it.

    Args:
        path: the folder of the checkpoint.
        holder: who needs it, for :func:`unpin`: one line of the file. Without it the file is empty, and stays for good.

    Raises:
        OSError: the file cannot be created.
    """
    file = _pin_of(path)
    if not holder:
        write_durably(file, "")
        return
    holders = _holders(file)
    if holders is None or (holders and holder not in holders):
        with open_append(file) as pins:
            pins.write(f"{holder}\n".encode())


def unpin(path: Path, holder: str) -> None:
    """End the protection that ``holder`` asked for. That of others stays, and so does one for good.

    Raises:
        OSError: the file cannot be changed.
    """
    file = _pin_of(path)
    holders = _holders(file)
    if not holders or holder not in holders:
        return
    if left := [each for each in holders if each != holder]:
        write_durably(file, "".join(f"{each}\n" for each in left))
    else:
        file.unlink(missing_ok=True)


def _holders(file: Path) -> list[str] | None:
    """Who needs a pinned checkpoint; empty: it is pinned for good; None: it is not pinned."""
    try:
        return read_regular(file, _LARGEST_PIN).decode(errors="replace").split()
    except FileNotFoundError:
        return None


def pinned(path: Path) -> bool:
    """Whether the checkpoint ``path`` is pinned."""
    return _pin_of(path).exists()


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pinned")


def remove(path: Path) -> None:
    """Delete the checkpoint ``path``. The marker goes first: without it, a half-deleted folder is no checkpoint.

    Raises:
        OSError: a file cannot be deleted.
    """
    (path / MARKER).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)
