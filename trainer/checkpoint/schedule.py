"""When a save is due: after a set number of updates, or at the interval that costs the least.

With peer copies (:mod:`trainer.checkpoint.peer_copies`) a lost rank is replaced in place and needs no save. The rate of
failures that counts is then that of pairs: a rank and its buddy are lost at once. Two of n lost nodes are a pair with a
probability of 1 / (n − 1). Replacements that fail and rollbacks also need a save. The trainer does not know how often
its supervisor replaces ranks, so ``checkpoint.failure_hours`` stays what the recipe says; docs/trainer.md tells users.
"""

import math
import time
from collections.abc import Callable

from trainer.recipes import Recipe

# The assumed cost of the first save, and the shortest interval for saves that cost almost nothing.
_FIRST_COST_SECONDS = 1.0
_LEAST_SECONDS = 60.0


class SaveSchedule:
    """When saves of one kind are due. Rank 0 decides by its clock, and the other ranks follow.

    A failure costs half an interval on average. A save costs the time that it holds training up. The sum is least at an
    interval of √(2 × cost × time between failures). The interval is never shorter than the writers need for a save.

    Args:
        every: updates between saves. With 0 the interval follows from the costs.
        failure_hours: the time between failures.
        clock: seconds; tests replace it.
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
        """Note that a save has started.

        Args:
            cost_seconds: how long it held training up.
            background_seconds: how long the writers needed for the save before.
        """
        self._last = self._clock()
        self._cost = cost_seconds
        self._background = background_seconds


class SaveSchedules:
    """When durable checkpoints and snapshots are due.

    Args:
        recipe: for the settings.
        snapshots: whether snapshots are made.
    """

    def __init__(self, recipe: Recipe, *, snapshots: bool) -> None:
        rule = recipe.checkpoint
        self._durable = SaveSchedule(recipe.checkpoint_every, rule.disaster_hours if snapshots else rule.failure_hours)
        self._snapshot = SaveSchedule(rule.snapshot_every, rule.failure_hours) if snapshots else None
        self._last_step = recipe.steps

    def durable(self, step: int) -> bool:
        """Whether a durable checkpoint is due after ``step``. After the last step one is always due."""
        return step == self._last_step or self._durable.due(step)

    def snapshot(self, step: int) -> bool:
        """Whether a snapshot is due after ``step``."""
        return self._snapshot is not None and self._snapshot.due(step)

    def saved(self, cost_seconds: float, background_seconds: float, *, durable: bool) -> None:
        """Note that a save has started. Where snapshots are made, a durable one starts with a snapshot.

        Args:
            cost_seconds: how long it held training up.
            background_seconds: how long the writers needed for the save before.
            durable: whether it is a durable checkpoint.
        """
        for schedule in (self._snapshot, self._durable if durable else None):
            if schedule:
                schedule.saved(cost_seconds, background_seconds)
