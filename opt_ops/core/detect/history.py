"""The loss detector of a curve that may go back: what was discarded is forgotten, as if it had never been seen.

The live watch and `opt-ops signals replay` run the same class, so that a replay finds what the daemon would have found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from itertools import chain

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.forecast import ForecastDetector
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.point import Point

_KEPT_POINTS = 4096
_DUE_POINTS = 512  # that are kept of those that an attempt discarded
_ATTEMPTS = 64
_COPY_POINTS = 1024
"""Between two copies of the detector. With fewer, going back is faster, and each point costs more."""


class CurveHistory:
    """Follows one curve over all attempts. Points come in the order in which they were written.

    It keeps the newest points and some copies of the detector. Where an attempt goes back, the detector is the one that
    had seen the points up to there. So what was discarded is in none of its bands and levels.
    """

    def __init__(
        self,
        new: Callable[[], LossDetector],
        observe: Callable[[LossDetector | ForecastDetector, Point], list[Finding] | None] = (
            lambda detector, point: detector.observe(point)
        ),
    ) -> None:
        """`new` makes a detector that has seen nothing. `observe` gives it a point; None: the point broke it."""
        self._new = new
        self._observe = observe
        self.detector = new()
        self._forecast = ForecastDetector()  # it can forget by itself, and so needs no copies
        self._kept: deque[Point] = deque(maxlen=_KEPT_POINTS)
        self._copies: deque[tuple[int, LossDetector]] = deque(maxlen=_KEPT_POINTS // _COPY_POINTS)
        """Copies of the detector, each with the last kept step that it has seen."""
        self._since_copy = 0  # points
        self._planned: list[int] = []
        self._begun: deque[tuple[int, tuple[Point, ...]]] = deque(maxlen=_ATTEMPTS)
        """The attempts that are not discarded: the step of each one's checkpoint, and the points due again."""
        self._remembered = False  # whether the detector has yet to learn what is kept
        self.due: tuple[Point, ...] = ()
        """The points that the newest attempt discarded: the loss that they show is due again."""

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next point, and return what it makes known. A point that breaks the detector is left out."""
        off = self._foretold(point)
        self._kept.append(point)
        found = self._observe(self.detector, point)
        if found is None:
            self._kept.pop()
            self._learn()
            return off
        self._since_copy += 1
        if self._since_copy >= _COPY_POINTS:
            self._since_copy = 0
            self._copies.append((point.step, deepcopy(self.detector)))
        return [*found, *off]

    def _foretold(self, point: Point) -> list[Finding]:
        """What the forecast makes of a point."""
        found = self._observe(self._forecast, point)
        if found is None:
            self._forecast = ForecastDetector(self._planned)
        return found or []

    def remember(self, point: Point) -> None:
        """Take in a point of an earlier attempt. The next `begin_attempt` learns it; nothing is found in it."""
        self._discard_after(point.step - 1)
        self._kept.append(point)
        self._remembered = True
        self._foretold(point)

    def remember_attempt(self, at_step: int) -> None:
        """An earlier attempt began from the checkpoint of `at_step`; its points follow. See `begin_attempt`."""
        due = self._discard_after(at_step)
        self.due = tuple(due[:_DUE_POINTS])
        while self._begun and self._begun[-1][0] >= at_step:
            self._begun.pop()
        self._begun.append((at_step, self.due))

    def _discard_after(self, step: int) -> list[Point]:
        """Forget the points after `step`. Returns them in their order."""
        self._forecast.begin(step)
        discarded: list[Point] = []
        while self._kept and self._kept[-1].step > step:
            discarded.append(self._kept.pop())
        while self._copies and self._copies[-1][0] > step:
            self._copies.pop()
        while self._begun and self._begun[-1][0] > step:
            self._begun.pop()
        self._remembered = self._remembered or bool(discarded)
        return discarded[::-1]

    def begin_attempt(self, at_step: int) -> None:
        """An attempt begins from the checkpoint of `at_step`: forget what came after it.

        The detector gets the discarded points: the loss that they show is due again.
        """
        self.remember_attempt(at_step)
        if self._remembered:
            self._learn()
        else:
            self.detector.begin_attempt(self.due)

    def restart(self, step: int) -> None:
        """The trainer, or another launcher, began again: its next point has this step."""
        self.begin_attempt(step - 1)

    def plan(self, step: int) -> None:
        """Something was planned from `step` on. Points that were seen since then are learned again."""
        if step in self._planned:
            return
        self._planned.append(step)
        self._forecast.plan(step)
        for detector in chain((copy for _, copy in self._copies), (self.detector,)):
            detector.plan(step)
        if self._kept and step <= self._kept[-1].step:
            while self._copies and self._copies[-1][0] >= step:
                self._copies.pop()
            self._learn()

    @property
    def planned(self) -> tuple[int, ...]:
        """The steps from which something was planned."""
        return tuple(self._planned)

    @property
    def kept(self) -> tuple[Point, ...]:
        """The newest points that no attempt discarded, oldest first."""
        return tuple(self._kept)

    def _learn(self) -> None:
        """Build the detector that has seen the kept points and no others, in their attempts."""
        since = self._copies[-1][0] if self._copies else None
        self.detector = deepcopy(self._copies[-1][1]) if self._copies else self._empty()
        self._since_copy, self._remembered = 0, False
        begun = deque(each for each in self._begun if since is None or each[0] >= since)
        for point in self._kept:
            if since is None or point.step > since:
                while begun and begun[0][0] < point.step:
                    self.detector.begin_attempt(begun.popleft()[1])
                self._since_copy += 1
                if self._observe(self.detector, point) is None:
                    self.detector = self._empty()
        for _, due in begun:
            self.detector.begin_attempt(due)

    def _empty(self) -> LossDetector:
        detector = self._new()
        for step in self._planned:
            detector.plan(step)
        return detector
