"""Virtual time, and what is still to happen in it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timeline:
    """Seconds since the world began, and the acts that are due. Acts are methods, so that a world can be copied."""

    def __init__(self) -> None:
        self.now = 0.0
        self.disturbed_at = 0.0
        """When something last happened that a supervisor may have to answer."""
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, time: float, act: Callable[..., None], *arguments: Any) -> None:
        """Have something happen at `time`, or now if that has passed. What is due together happens in order."""
        self._number += 1
        heapq.heappush(self._due, (max(time, self.now), self._number, act, arguments))

    def after(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Have something happen `seconds` from now."""
        self.at(self.now + seconds, act, *arguments)

    @property
    def next_at(self) -> float:
        """When the next act is due."""
        return self._due[0][0] if self._due else float("inf")

    def pop(self) -> None:
        """Let the next act happen, at its time."""
        self.now, _, act, arguments = heapq.heappop(self._due)
        act(*arguments)

    def disturb(self) -> None:
        """Something happened that a supervisor may have to answer: look closely for a while."""
        self.disturbed_at = self.now
