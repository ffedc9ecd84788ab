"""Virtual time, and the actions that are due."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timeline:
    """Virtual seconds, and a queue of actions. Actions are methods, so that a world can be copied."""

    def __init__(self) -> None:
        self.now = 0.0
        self.disturbed_at = 0.0
        """When the last event happened to which a supervisor may have to react."""
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, time: float, act: Callable[..., None], *arguments: Any) -> None:
        """Schedule an action at `time`, or now if that has passed. Actions of one time run in order of calls."""
        self._number += 1
        heapq.heappush(self._due, (max(time, self.now), self._number, act, arguments))

    def after(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Schedule an action `seconds` from now."""
        self.at(self.now + seconds, act, *arguments)

    @property
    def next_at(self) -> float:
        """When the next action is due; infinity if there is none."""
        return self._due[0][0] if self._due else float("inf")

    def pop(self) -> None:
        """Run the next action, at its time."""
        self.now, _, act, arguments = heapq.heappop(self._due)
        act(*arguments)

    def disturb(self) -> None:
        """Note an event to which a supervisor may have to react: it ticks often for a while."""
        self.disturbed_at = self.now
