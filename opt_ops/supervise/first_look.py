"""In which order a daemon that starts looks at the lineages: those that trained first, the others a few in each round.

To know whether a lineage lives, its journal must be read. A runs folder of hundreds of ended lineages takes a minute of
that, for example after an upgrade, and the lineages that live must not wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from opt_ops.runfolder.liveness import Sign
from opt_ops.runfolder.owner import OwnerFile

READ_SECONDS = 0.5
"""For lineages that were not looked at yet, in a round. What is watched waits meanwhile."""

log = logging.getLogger(__name__)


class FirstLook:
    """Which lineages this daemon process has looked at. The order is only a guess: each of them gets its look."""

    def __init__(self) -> None:
        self.left: int | None = None
        """Lineages that were not looked at yet; None: they were not counted yet."""
        self._looked_at: set[Path] = set()
        self.before: Sign | None = None
        """The newest sign of an earlier daemon process."""
        self._watched: frozenset[str] = frozenset()

    def learn(self, signs: Sequence[Sign]) -> None:
        """Note what earlier daemon processes watched."""
        self.before = max(signs, key=lambda sign: sign.ts, default=None)
        self._watched = frozenset(name for sign in signs for name in sign.lineages)

    def due(self, found: Sequence[Path]) -> Iterator[Path]:
        """Yield the lineages to look at in this round: all known ones, and new ones until the time is up."""
        yield from [path for path in found if path in self._looked_at]
        new = sorted((path for path in found if path not in self._looked_at), key=self._rank)
        began, before = time.monotonic(), self.left
        self.left = len(new)
        for path in new:
            yield path
            self._looked_at.add(path)
            self.left -= 1
            if time.monotonic() - began >= READ_SECONDS:
                break
        if self.left and not before:
            log.info("%d lineages are still to be read; those that trained last came first", self.left)
        elif before and not self.left:
            log.info("all lineages are read")

    def _rank(self, path: Path) -> tuple[bool, float]:
        """First what was watched to the end, then what moved last: life of its owner, a request in its inbox."""
        moved = 0.0
        for each in (OwnerFile(path / "journal").path, path / "inbox"):
            with suppress(OSError):  # there is none, or it cannot be looked at: the look itself tells that
                moved = max(moved, each.stat().st_mtime)
        return path.name not in self._watched, -moved
