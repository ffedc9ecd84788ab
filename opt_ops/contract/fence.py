"""The newest attempt's name, so that an older one that was thought dead cannot write into its lineage."""

import json
import sys
import time
from pathlib import Path

from trainer.console import say
from trainer.errors import SupersededError

# One second, so that two never pass between looks where updates take less than one.
_LOOK_EVERY_SECONDS = 1.0


class Fence:
    """Watches a file that names the newest attempt of the lineage. For rank 0 alone.

    A file that is missing or cannot be read fences nobody off: a shared file system that fails must not end training.

    Args:
        path: the file; without one there is no fence.
        attempt: who we are.
    """

    def __init__(self, path: Path | None, attempt: str) -> None:
        self._path = path
        self._attempt = attempt
        self._looked = -_LOOK_EVERY_SECONDS
        self._newest: str | None = None
        self._complained = False

    @property
    def superseded(self) -> bool:
        """Whether another attempt is the newest, by a look that is not older than a second."""
        if time.monotonic() - self._looked >= _LOOK_EVERY_SECONDS:
            self.look()
        return self._newest not in (None, self._attempt)

    def check(self) -> None:
        """Look now.

        Raises:
            SupersededError: another attempt is the newest.
        """
        self.look()
        if self.superseded:
            raise SupersededError(f"superseded: a newer attempt exists: {self._path} names {self._newest}")

    def look(self) -> None:
        """Read the file. That it cannot be read is said once, also by a copy that is made after this."""
        self._looked = time.monotonic()
        if self._path is None:
            return
        try:
            self._newest = str(json.loads(self._path.read_text(encoding="utf-8"))["attempt"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self._complained:
                say(f"note: the fence {self._path} cannot be read and fences nobody off: {error!r}", sys.stderr)
            self._complained = True
