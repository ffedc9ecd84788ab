"""The folder for token files, and the lock that lets one process of a host build each of them."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import UserError

# The progress of a build is reported at this interval. A watcher should wait for twice as long.
LOOK_EVERY_SECONDS = 300.0

FORMAT = 2  # of the cache: with a new number, old entries are not found any more


def folder() -> Path:
    """The folder: ``$OPT_OPS_CACHE``, else ``~/.cache/opt-ops``."""
    return Path(os.environ.get("OPT_OPS_CACHE") or Path.home() / ".cache" / "opt-ops")


FileVersion = tuple[str, int, int]
"""Path, size in bytes, and modification time in nanoseconds of a file."""


def versions(files: Sequence[Path]) -> list[FileVersion]:
    """Path, size and modification time of each file. They change when the file changes.

    Raises:
        OSError: a file does not exist.
    """
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


@contextmanager
def one_builder(cache: Path, name: str) -> Iterator[None]:
    """Let one process of this host build while the others wait. If it dies, the kernel frees the lock.

    The lock only saves work. Where the file system has no locks, several processes may build the same entry. That does
    no harm, because an entry appears by a rename.

    Raises:
        UserError: the cache folder cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"the token cache cannot be written: {error}. Set OPT_OPS_CACHE to a writable folder."
        ) from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def watched(cache: Path, name: str, grows: Callable[[], None]) -> Iterator[None]:
    """Call ``grows`` from another thread, from time to time, while the build of ``name`` makes progress.

    The build may run in another process.
    """
    over = threading.Event()

    def watch() -> None:
        before = _built(cache, name)
        while not over.wait(LOOK_EVERY_SECONDS):
            now = _built(cache, name)
            if now != before:
                grows()
            before = now

    thread = threading.Thread(target=watch, daemon=True, name="watches tokens")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _built(cache: Path, name: str) -> set[tuple[str, int]]:
    """The present state of a build: its folders, which change with each part, and the files that join the parts."""
    found: set[tuple[str, int]] = set()
    for pattern in (f".{name}.*", f".{name}.*/*.npy"):
        with suppress(OSError):  # a folder or file was just removed, also under the search: the build makes progress
            found.update((path.name, path.stat().st_mtime_ns) for path in cache.glob(pattern))
    return found
