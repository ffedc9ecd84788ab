"""The fence: a file that names the newest attempt of a lineage, and the newest generation of its membership.

An attempt that was believed dead may still be alive. It must not write checkpoints once a newer attempt has started.
The same holds for the ranks of an older generation of the same attempt.
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


class OutdatedError(Exception):
    """A newer generation of the membership exists. What this rank would write belongs to an older one."""


class Fence:
    """Reads the file that names the newest attempt. Used by rank 0 only.

    A file that is missing or unreadable stops nobody: a shared file system that fails must not end training.

    Args:
        path: the file. With None there is no fence.
        attempt: the name of this attempt.
        generation: of the membership that this rank takes part in.

    Attributes:
        generation: as above. A rank that joins a newer one sets it.
    """

    def __init__(self, path: Path | None, attempt: str, generation: int = 1) -> None:
        self._path = path
        self._attempt = attempt
        self.generation = generation
        self._newest_generation = generation
        self._read_at = -_MAX_AGE_SECONDS
        self._newest: str | None = None
        self._warned = False

    @property
    def superseded(self) -> bool:
        """Whether the file named another attempt when it was last read, at most a second ago."""
        if time.monotonic() - self._read_at >= _MAX_AGE_SECONDS:
            self.refresh()
        return self._newest not in (None, self._attempt)

    @property
    def others_write(self) -> bool:
        """Whether the file names another attempt or a newer generation: the folders may be theirs by now."""
        return self.superseded or self._newest_generation > self.generation

    def check(self) -> None:
        """Read the file now.

        Raises:
            SupersededError: the file names another attempt.
            OutdatedError: it names a newer generation of this one.
        """
        self.refresh()
        if self.superseded:
            raise SupersededError(f"superseded: a newer attempt exists: {self._path} names {self._newest}")
        if self._newest_generation > self.generation:
            raise OutdatedError(f"{self._path} names generation {self._newest_generation}; this is {self.generation}")

    def refresh(self) -> None:
        """Read the file now. A file that cannot be read is logged once.

        A copy of this object, as in a forked process, does not log it a second time.
        """
        self._read_at = time.monotonic()
        if self._path is None:
            return
        try:
            named = json.loads(read_regular(self._path, _MOST_BYTES))
            self._newest, self._newest_generation = str(named["attempt"]), int(named.get("generation", 1))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if not self._warned:
                log.warning("note: the fence %s cannot be read and is ignored: %r", self._path, error)
            self._warned = True
