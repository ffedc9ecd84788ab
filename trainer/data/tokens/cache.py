"""The folder where tokens are kept, and how the processes of a host agree who makes them."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import UserError

# Between two looks at a build. Whoever waits for the next word of it waits for twice as long.
LOOK_EVERY_SECONDS = 300.0

FORMAT = 2  # of the cache: a new number makes the old entries unreachable


def folder() -> Path:
    """``$OPT_OPS_CACHE``, else ``~/.cache/opt-ops``."""
    return Path(os.environ.get("OPT_OPS_CACHE") or Path.home() / ".cache" / "opt-ops")


def versions(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file does, without reading it."""
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


@contextmanager
def one_builder(cache: Path, name: str) -> Iterator[None]:
    """Let one process of this host build and the others wait; the kernel frees the lock of a builder that dies.

    Only saves work: entries appear by rename, so where the file system has no locks, several may build the same.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    except OSError as error:
        raise UserError(f"no room for the tokenised data: {error}. Set OPT_OPS_CACHE to a writable folder.") from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def watched(cache: Path, name: str, grows: Callable[[], None]) -> Iterator[None]:
    """Call ``grows``, from another thread, now and then while the build of ``name`` gets on, whoever is at it."""
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
    """What there is of a build: its folders, which change with each part, and the files that parts are joined in."""
    found: set[tuple[str, int]] = set()
    for pattern in (f".{name}.*", f".{name}.*/*.npy"):
        for path in cache.glob(pattern):
            with suppress(OSError):  # gone meanwhile: the build gets on
                found.add((path.name, path.stat().st_mtime_ns))
    return found
