"""What the daemon would have found in a curve, had it watched the training that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from opt_ops.core.decide.policy import Policy
from opt_ops.core.detect.all import Detector, of_the_model
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.history import CurveHistory
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.runfolder.step_order import StepOrder

MOST_ATTEMPTS = 1000
"""A file with more of them holds several runs side by side, or its lines are in no order."""


class TooManyAttempts(ValueError):
    """The steps of a curve go back too often."""


@dataclass(slots=True)
class Found:
    """A finding, with its attempt and, if the file has several, its run. A dead loss is one finding: it grows."""

    finding: Finding
    attempt: int
    run: str | None


class CurveReplay:
    """Takes in a curve line by line, in the order of the file. `found` grows with it.

    A new attempt begins where the label of the attempt changes. Without labels it begins where steps go back. What it
    discards is forgotten, as in the daemon. Each run is a curve of its own.
    """

    def __init__(
        self, policy: Policy, planned: Sequence[int] = (), on_stray: Callable[[str], None] = lambda _: None
    ) -> None:
        """`planned` are steps from which something was planned. `on_stray` gets the reason for each line left out."""
        self._policy = policy
        self._planned = planned
        self._on_stray = on_stray
        self.found: list[Found] = []
        self.points = self.attempts = 0
        self._lowest = self._highest = 0
        self._attempt = 0
        self._labels: tuple[str | None, str | None] = (None, None)
        self._begin_run()

    def take(self, point: Point, attempt: str | None = None, run: str | None = None) -> None:
        """Take in the next line, with what the file says of its attempt and run.

        Raises:
            TooManyAttempts: steps go back too often.
        """
        if self._labels != (attempt, run):
            if self._labels[1] != run and self.points:
                self._begin_run()
            self._order = self._new_order()
            self._begins = True
            self._labels = attempt, run
        for each in self._order.take(point):
            self._take(each)

    @property
    def span(self) -> str:
        """The lowest and the highest step, in words."""
        return f"{self._lowest} to {self._highest}"

    def _begin_run(self) -> None:
        self._curve = CurveHistory(lambda: LossDetector(self._policy.spike, self._policy.drift))
        for step in self._planned:
            self._curve.plan(step)
        self._order = self._new_order()
        self._last: Point | None = None
        self._attempt = 0
        self._begins = True
        self._keys: set[tuple[str, str, int, int]] = set()
        self._detectors: Sequence[Detector] = ()
        self._dead: Found | None = None

    def _new_order(self) -> StepOrder:
        return StepOrder(self._on_stray, attempts=True)

    def _take(self, point: Point) -> None:
        back = self._last is not None and point.step <= self._last.step
        if self._begins or (back and self._labels[0] is None):
            self._begin_attempt(point)
        elif back:
            self._curve.restart(point.step)  # the trainer began again by itself, in the same attempt
        self._last = point
        self._lowest = min(self._lowest, point.step) if self.points else point.step
        self._highest = max(self._highest, point.step)
        self.points += 1
        died = self._dead is not None and not point.finite
        for finding in self._findings(point):
            if not (died and finding.signal == FailureClass.NON_FINITE_LOSS):
                self._add(finding)
        self._count_dead(point)

    def _findings(self, point: Point) -> Iterator[Finding]:
        yield from self._curve.observe(point)
        for detector in self._detectors:
            yield from detector.observe(point)

    def _begin_attempt(self, point: Point) -> None:
        self._begins = False
        label = self._labels[0]
        self._attempt = int(label) if label is not None and label.isdecimal() and len(label) < 10 else self._attempt + 1
        self.attempts += 1
        if self.attempts > MOST_ATTEMPTS:
            raise TooManyAttempts(f"more than {MOST_ATTEMPTS} attempts until step {point.step}")
        if self._last is not None:
            self._curve.restart(point.step)
        self._detectors = of_the_model(self._policy.loss_scale)
        self._dead = None

    def _add(self, finding: Finding) -> None:
        key = (finding.signal, finding.tier, self._attempt, finding.onset_step)
        if key in self._keys:  # the daemon tells a finding once
            return
        self._keys.add(key)
        self.found.append(Found(finding, self._attempt, self._labels[1]))
        if finding.signal == FailureClass.NON_FINITE_LOSS:
            self._dead = self.found[-1]

    def _count_dead(self, point: Point) -> None:
        """A loss that stays not finite says nothing new on each line."""
        dead = self._dead
        if dead is None:
            return
        if point.finite:
            self._dead = None
        elif point.skip is None:
            points = dead.finding.evidence.get("points", 0) + 1
            evidence = {**dead.finding.evidence, "points": points, "last_step": point.step}
            dead.finding = replace(dead.finding, evidence=evidence)
