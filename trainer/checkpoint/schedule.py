"""When a save is due: as often as pays, or after a number of updates that is set."""

import math
import time
from collections.abc import Callable

from trainer.recipes import Recipe

# What the first save is taken to cost, and how seldom a save may be that costs next to nothing.
_FIRST_COST_SECONDS = 1.0
_LEAST_SECONDS = 60.0


class Schedule:
    """When saves of one tier are due, by the clock of rank 0, which tells the others.

    A failure costs half an interval on average and a save costs what it holds training up, so the least is lost with
    an interval of √(2 × cost × time between failures). It is never shorter than a save takes in the background.

    Args:
        every: updates between saves; 0: as often as pays.
        failure_hours: the time between failures.
        clock: seconds, for tests.
    """

    def __init__(self, every: int, failure_hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._failure_seconds = failure_hours * 3600
        self._clock = clock
        self._cost = _FIRST_COST_SECONDS
        self._background = 0.0
        self._last = clock()

    @property
    def interval(self) -> float:
        """Seconds between two saves."""
        best = math.sqrt(2 * self._cost * self._failure_seconds)
        return max(best, self._background, _LEAST_SECONDS)

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` should be saved."""
        if self._every:
            return step % self._every == 0
        return self._clock() - self._last >= self.interval

    def saved(self, cost_seconds: float, background_seconds: float) -> None:
        """A save has begun, which held training up; the one before took ``background_seconds`` to be written."""
        self._last = self._clock()
        self._cost = cost_seconds
        self._background = background_seconds


class Saves:
    """When saves of both tiers are due.

    Args:
        recipe: for the settings.
        snapshots: whether there are any.
    """

    def __init__(self, recipe: Recipe, *, snapshots: bool) -> None:
        rule = recipe.checkpoint
        self._durable = Schedule(recipe.checkpoint_every, rule.disaster_hours if snapshots else rule.failure_hours)
        self._snapshot = Schedule(rule.snapshot_every, rule.failure_hours) if snapshots else None
        self._last_step = recipe.steps

    def durable(self, step: int) -> bool:
        """Whether the state after ``step`` should be saved for good. The last one always is."""
        return step == self._last_step or self._durable.due(step)

    def snapshot(self, step: int) -> bool:
        """Whether there should be a snapshot of the state after ``step``."""
        return self._snapshot is not None and self._snapshot.due(step)

    def saved(self, cost_seconds: float, background_seconds: float, *, durable: bool) -> None:
        """A save has begun. A durable one is a snapshot, too, where there are any."""
        for schedule in (self._snapshot, self._durable if durable else None):
            if schedule:
                schedule.saved(cost_seconds, background_seconds)
