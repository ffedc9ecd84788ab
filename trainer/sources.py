"""Which sources this process runs. Those on disk may be newer: somebody has corrected a fault meanwhile."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def running_code() -> str:
    """The digest of the sources that this process has imported. Called first while they are imported.

    A process that is forked from a warm one has the code of that.
    """
    return code_on_disk()


def code_on_disk() -> str:
    """A digest of the sources of this package, twelve hex digits. It does not depend on where they are installed."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def has_changed() -> bool:
    """Whether the sources on disk are others than those that this process runs."""
    try:
        return code_on_disk() != running_code()
    except OSError:  # they are being replaced
        return True
