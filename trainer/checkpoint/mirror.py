"""Copy durable checkpoints to a second place, at any URL that fsspec knows, and fetch them from there.

The order is that of a save: shards, the report of each rank, the manifest, and the marker last. A torn upload has no
marker. A damaged one differs from its manifest, which is compared when it is fetched.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opt_ops.contract import manifest
from opt_ops.contract.files import sync_folder
from opt_ops.contract.manifest import MANIFEST, MARKER, CheckpointError, folders_of

_CHUNK = 16 << 20  # bytes


def send(path: Path, url: str, rank: int, ranks: int, deadline_seconds: float) -> None:
    """Upload this rank's files of the committed checkpoint ``path`` into the folder ``url``. Rank 0 finishes it.

    Args:
        path: the checkpoint.
        url: the folder for checkpoints at the second place.
        rank: this rank.
        ranks: number of ranks.
        deadline_seconds: how long rank 0 waits for the others.

    Raises:
        OSError: a file cannot be read or sent.
        TimeoutError: the report of another rank did not arrive.
    """
    files, target = _open(f"{url.rstrip('/')}/{path.name}")
    report = f"rank-{rank:04d}.json"
    if rank == 0 and files.exists(f"{target}/{MARKER}"):
        files.rm_file(f"{target}/{MARKER}")
    for name in manifest.written_by(path, rank):
        _put(path / name, files, f"{target}/{name}")
    _put(path / report, files, f"{target}/{report}")
    if rank > 0:
        return
    # The content is compared, too: a torn upload may have left reports of other shards.
    waiting = {f"rank-{other:04d}.json" for other in range(ranks)}
    deadline = time.monotonic() + deadline_seconds
    while waiting := {name for name in waiting if not _arrived(path / name, files, f"{target}/{name}")}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url}: no {min(waiting)} of this save after {deadline_seconds:.0f} s")
        time.sleep(0.2)
        files.invalidate_cache()
    for name, expected in manifest.read(path).files.items():
        size = files.info(f"{target}/{name}")["size"]
        if size != expected["size"]:
            raise OSError(f"{url}/{path.name}/{name} has {size} bytes of {expected['size']}")
    for name in (MANIFEST, MARKER):
        _put(path / name, files, f"{target}/{name}")


def fetch(url: str, folder: Path) -> Path:
    """Download the checkpoint ``url`` into ``folder``, verify it, and return its path.

    Raises:
        CheckpointError: it is missing, torn or damaged, or the target exists. Nothing of a bad download is left.
        OSError: the URL cannot be read, or the folder cannot be written.
    """
    files, source = _open(url)
    path = folder / source.rstrip("/").rpartition("/")[2]
    if path.exists():
        raise CheckpointError(path, "the folder exists: remove it, or fetch into another folder")
    path.mkdir(parents=True)
    try:
        text, marker = _read(files, source, MANIFEST), _read(files, source, MARKER)
        names = [MANIFEST, *manifest.parse(Path(url), text, marker).files, MARKER]
        for name in names:
            with _opened(files, source, name) as remote:
                _write_durably(remote, path / name)
        _sync_folders(path, names)
        sync_folder(folder)
        manifest.verify(path)
    except BaseException:
        shutil.rmtree(path)
        raise
    return path


def _read(files: Any, source: str, name: str) -> bytes:
    with _opened(files, source, name) as file:
        return file.read()


def _opened(files: Any, source: str, name: str) -> Any:
    try:
        return files.open(f"{source}/{name}", "rb")
    except FileNotFoundError:
        raise CheckpointError(Path(source), f"{name} is missing: the upload was never finished") from None


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # imported only where it is needed: most runs have no second place

    files, path = url_to_fs(url)
    return files, path


def _arrived(source: Path, files: Any, target: str) -> bool:
    try:
        return files.cat_file(target) == source.read_bytes()
    except FileNotFoundError:
        return False


def _put(source: Path, files: Any, target: str) -> None:
    files.makedirs(target.rpartition("/")[0], exist_ok=True)
    with source.open("rb") as local, files.open(target, "wb") as remote:
        shutil.copyfileobj(local, remote, _CHUNK)


def copy_durably(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files ``names`` from a folder into another one, with their subfolders, and sync the copies.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = list(names)
    for name in names:
        with (folder / name).open("rb") as file:
            _write_durably(file, target / name)
    _sync_folders(target, names)


def _write_durably(source: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK)
        copy.flush()
        os.fsync(copy.fileno())


def _sync_folders(path: Path, names: Iterable[str]) -> None:
    """Sync the folders of the files ``names`` in ``path``, and ``path`` itself."""
    for folder in {path} | {each for name in names for each in folders_of(path, name)}:
        sync_folder(folder)
