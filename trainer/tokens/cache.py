"""The folder where tokens are kept, and how the processes of a host agree who makes them."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import UserError

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
