"""What was compiled at run time is kept in a cache, under the hash of what it was made from."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import UserError


def folder() -> Path:
    """The cache: ``kernels`` in ``$OPT_OPS_CACHE``, else in ``~/.cache/opt-ops``."""
    return Path(os.environ.get("OPT_OPS_CACHE") or Path.home() / ".cache" / "opt-ops") / "kernels"


def kept(parts: Sequence[str], suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that ``make`` writes, from the cache if it was made before.

    Several processes may make it at the same time. Each writes to a name of its own and renames it.

    Args:
        parts: all that the content depends on: sources, options, architecture, version of the compiler.
        suffix: of the file's name.
        make: writes the file to the path that it gets.

    Raises:
        UserError: the cache cannot be written.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = folder() / f"{digest[:32]}{suffix}"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary) / path.name
            make(made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)
    except OSError as error:
        raise UserError(
            f"Cannot keep the compiled kernel {path}: {error}. Set OPT_OPS_CACHE to a folder that this user can write."
        ) from error
    return path
