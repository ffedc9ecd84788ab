"""When training will end, by the pace of its last steps and not by goodput: an outage in the past predicts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from chronicles.kept_curve import AttemptCurve
from chronicles.logbook.front_page import IN_SIGHT
from chronicles.record import Moment

_STEPS = 50  # at the newest pace
_GROUP = 10  # steps whose mean is compared: the time of one step is noise, and a save belongs to one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedEnd:
    """Between which times the last step is expected if training goes on without a stop."""

    earliest: Moment
    latest: Moment


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a step over the last steps: of all, and of the fastest and slowest ten of them. Saves are included."""

    steps: int
    seconds: float
    fastest: float
    slowest: float

    def end(self, now: float, left: int) -> ExpectedEnd | None:
        """When `left` more steps will be made from `now` on; None if that is no estimate."""
        if left * self.slowest > IN_SIGHT:
            return None
        return ExpectedEnd(earliest=Moment(now + left * self.fastest), latest=Moment(now + left * self.slowest))


def pace(curves: Sequence[AttemptCurve]) -> Pace | None:
    """The pace of the last 50 steps, standstills between attempts left out; None while no two steps are known."""
    newest = list(islice(_newest_times(curves), _STEPS))
    if not newest:
        return None
    groups = [newest[at : at + _GROUP] for at in range(0, len(newest), _GROUP)]
    whole = [sum(group) / len(group) for group in groups if len(group) == _GROUP] or [sum(newest) / len(newest)]
    return Pace(len(newest), sum(newest) / len(newest), min(whole), max(whole))


def _newest_times(curves: Sequence[AttemptCurve]) -> Iterator[float]:
    """Seconds between neighbouring steps of one attempt, newest first."""
    for curve in reversed(curves):
        for later, earlier in pairwise(reversed(curve.points[-_STEPS - 1 :])):
            if later.ts > earlier.ts and later.step > earlier.step:
                yield (later.ts - earlier.ts) / (later.step - earlier.step)
