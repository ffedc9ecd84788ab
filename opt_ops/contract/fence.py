"""The fence: a file that names the newest attempt of a lineage.

An attempt that was believed dead may still be alive. It must not write checkpoints once a newer attempt has started.
"""

import json
import logging
import time
from pathlib import Path

from opt_ops.contract.files import read_regular

log = logging.getLogger(__name__)

# At most one second old: even where an update takes less, the fence is read about once per update.
_MAX_AGE_SECONDS = 1.0
_MOST_BYTES = 2**16  # it has about 100


class SupersededError(Exception):
    """A newer attempt of the lineage exists. This attempt must not write any more. Exit code 83."""


class Fence:
    """Reads the file that names the newest attempt. Used by rank 0 only.

    A file that is missing or unreadable stops nobody: a shared file system that fails must not end training.

    Args:
        path: the file. With None there is no fence.
        attempt: the name of this attempt.
    """

    def __init__(self, path: Path | None, attempt: str) -> None:
        self._path = path
        self._attempt = attempt
        self._read_at = -_MAX_AGE_SECONDS
        self._newest: str | None = None
        self._warned = False

    @property
    def superseded(self) -> bool:
        """Whether the file named another attempt when it was last read, at most a second ago."""
        if time.monotonic() - self._read_at >= _MAX_AGE_SECONDS:
            self.refresh()
        return self._newest not in (None, self._attempt)

    def check(self) -> None:
        """Read the file now.

        Raises:
            SupersededError: the file names another attempt.
        """
        self.refresh()
        if self.superseded:
            raise SupersededError(f"superseded: a newer attempt exists: {self._path} names {self._newest}")

    def refresh(self) -> None:
        """Read the file now. A file that cannot be read is logged once.

        A copy of this object, as in a forked process, does not log it a second time.
        """
        self._read_at = time.monotonic()
        if self._path is None:
            return
        try:
            self._newest = str(json.loads(read_regular(self._path, _MOST_BYTES))["attempt"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if not self._warned:
                log.warning("note: the fence %s cannot be read and is ignored: %r", self._path, error)
            self._warned = True
