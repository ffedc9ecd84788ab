"""Waits by the wall clock, and pauses between tries."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

SKEW_SECONDS = 60.0
"""That the clocks of two hosts may differ by. Slurm takes about as long to end a job at its limit (KillWait)."""

_MOST_STEPS = 64  # of growth: beyond that the pause is at its limit, and the power would overflow


def still_waiting(now: float, since: float, seconds: float) -> bool:
    """Whether a wait of `seconds` that began at `since` goes on.

    Times are wall-clock times, which operators and time servers set. A clock that is set back by an hour ends the wait;
    it does not prolong it.
    """
    return -SKEW_SECONDS <= now - since < seconds


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pause between tries: `first` seconds, then `factor` × the pause before, never more than `most`.

    With a factor of 1 every pause is the same.
    """

    first: float
    factor: float = 1.0
    most: float = math.inf

    def pause(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row. Before the first failure there is no wait."""
        if failures <= 0:
            return 0.0
        return min(self.most, self.first * self.factor ** min(failures - 1, _MOST_STEPS))


class Retries:
    """When several things may be tried again, each by its name. Times are monotonic seconds."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._tries: dict[Hashable, tuple[int, float]] = {}
        """How often each was tried since its last success, and when last."""

    def due(self, name: Hashable, now: float) -> bool:
        """Whether it was not tried yet, or the pause after its last try is over."""
        tries, last = self._tries.get(name, (0, now))
        return now - last >= self._backoff.pause(tries)

    def tried(self, name: Hashable, now: float) -> int:
        """Count a try. Returns how many there were since the last success."""
        tries = self._tries.get(name, (0, now))[0] + 1
        self._tries[name] = tries, now
        return tries

    def succeeded(self, name: Hashable) -> None:
        """Forget the tries: the next failure is the first one again."""
        self._tries.pop(name, None)
