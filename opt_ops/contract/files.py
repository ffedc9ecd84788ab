"""Write a file so that it is whole after a crash."""

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO


def write_durably(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``. After a crash at any point the file holds all of ``text``, or what it held before.

    The text goes into a temporary file in the same folder. That file is synced and renamed, then the folder is synced.
    Only this user may write it, whatever the umask: readers refuse orders that others can change.

    Raises:
        OSError: the file cannot be written. ``path`` keeps what it held, and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_regular(path: Path) -> int:
    """Open a regular file for reading, and return its descriptor. This never waits for another process.

    Raises:
        OSError: it cannot be opened, or it is a named pipe, a socket, a device or a folder.
    """
    return _regular(path, os.O_RDONLY)


def open_append(path: Path) -> BinaryIO:
    """Open a regular file to read it and to append to it. It is created if there is none. This waits for nobody.

    Raises:
        OSError: it can be neither opened nor created, or it is a named pipe, a socket, a device or a folder.
    """
    return os.fdopen(_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+b")


def _regular(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EPERM, "it is not a regular file", str(path))
    os.set_blocking(descriptor, True)  # for the process that gets it as its output
    return descriptor


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file, in hex.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync ``folder`` itself, so that a rename in it survives a crash.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
