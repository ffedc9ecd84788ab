"""The order of steps in a log: a step that falls is a job that began again, a rank that is slower, or a stray."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from opt_ops.watch_job.reading import Reading

_JUMP = 10_000
"""Steps forward from one line to the next that another line must confirm."""
_ECHO = 3
"""Newest lines whose steps are not a restart when they come again: another rank tells them, a little later."""
MOST_ATTEMPTS = 200
"""A log with more of them holds several ranks or runs side by side, and steps that fall say nothing any more."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """A reading that counts. `begins`: an attempt begins with it, because the job began again."""

    reading: Reading
    begins: bool = False


class StepOrder:
    """Takes in readings in the order of the log, and says which count and where the job began again.

    A step that falls is kept back. If the next line continues from it, the job began again there.
    """

    def __init__(self) -> None:
        self.attempts = 0
        self.left_out = 0
        """Readings that do not follow: those of other ranks, and strays."""
        self._newest: deque[int] = deque(maxlen=_ECHO)
        self._kept_back: Reading | None = None

    @property
    def mixed(self) -> bool:
        """Whether steps fall so often that restarts cannot be told from ranks side by side."""
        return self.attempts >= MOST_ATTEMPTS

    def take(self, reading: Reading) -> list[Ordered]:
        """Take in the next reading; those that count now, none to two."""
        step = reading.step
        if step is None:
            self.left_out += 1
            return []
        before, self._kept_back = self._kept_back, None
        if not self._newest:
            return [self._count(reading, begins=not self.attempts)]
        last = self._newest[-1]
        if before is not None and before.step is not None and before.step < step <= before.step + _JUMP:
            back = before.step <= last
            if not (back and step > last and step - last <= self._usual()):  # else the old order goes on
                return [self._count(before, begins=back), self._count(reading)]
        self.left_out += before is not None
        if last < step <= last + _JUMP:
            return [self._count(reading)]
        if last - self._usual() * _ECHO < step <= last and step >= self._newest[0]:
            self.left_out += 1
            return []
        if step <= last and self.mixed:
            self.left_out += 1
            return []
        self._kept_back = reading
        return []

    def end(self) -> list[Ordered]:
        """The log has ended: a step that fell, and that no line follows, was a restart."""
        before, self._kept_back = self._kept_back, None
        if before is None or before.step is None or not self._newest or before.step > self._newest[-1]:
            return []
        return [self._count(before, begins=True)]

    def _usual(self) -> int:
        """Steps from one line to the next."""
        known = list(self._newest)
        return max([1, *(later - earlier for earlier, later in pairwise(known))])

    def _count(self, reading: Reading, begins: bool = False) -> Ordered:
        assert reading.step is not None
        if begins:
            self.attempts += 1
            self._newest.clear()
        self._newest.append(reading.step)
        return Ordered(reading, begins)
