"""How long things take: hangs, and ranks that are slower than their peers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from opt_ops.core.signals import Finding, Point, RobustWindow
from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class HangRule:
    """How long without progress is too long: `multiple` × the longest of the phase's last times, at least the floor."""

    multiple: float = 2.0
    floor_seconds: float = 30.0
    startup_seconds: float = 900.0  # where nothing is known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerRule:
    """When a rank counts as slow: busy `ratio` times as long as the median rank, in `persist` steps in a row."""

    ratio: float = 1.3
    persist: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaleRule:
    """When fp16's loss scale is stuck: at or below the floor for `persist` steps in a row.

    OPT-175B was restarted from checkpoints whose loss scale was still at or above 1 (arXiv 2205.01068, section 2.5).
    """

    floor: float = 0.03125  # 2^-5, metaseq's min_loss_scale
    persist: int = 10


class UsualTimes:
    """The last times of each phase: a step's for training, its whole length for every other."""

    def __init__(self) -> None:
        self._windows: defaultdict[str, RobustWindow] = defaultdict(lambda: RobustWindow(64))

    def observe(self, phase: str, seconds: float) -> None:
        """Take in a time."""
        self._windows[phase].add(seconds)

    def patience(self, phase: str, rule: HangRule) -> float:
        """Seconds without progress after which the phase counts as hung."""
        window = self._windows[phase]
        if not len(window):
            return rule.startup_seconds
        return max(rule.floor_seconds, rule.multiple * window.largest)


class StragglerDetector:
    """One rank that takes longer than the others, step after step."""

    def __init__(self, rule: StragglerRule) -> None:
        self._rule = rule
        self._rank = -1
        self._since: Point | None = None
        self._steps = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        busy = point.busy
        if busy is None or busy.max < self._rule.ratio * busy.median or busy.median <= 0:
            self._rank, self._steps = -1, 0
            return []
        if busy.rank != self._rank:
            self._rank, self._since, self._steps = busy.rank, point, 0
        self._steps += 1
        if self._steps != self._rule.persist or self._since is None:
            return []
        return [
            Finding(
                signal="straggler",
                tier=Tier.ACT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=f"{self._rule.ratio:g} times as busy as the median rank for {self._rule.persist} steps",
                evidence={
                    "rank": busy.rank,
                    "ratio": busy.max / busy.median,
                    "seconds": busy.max,
                    "usual": busy.median,
                },
            )
        ]


class LossScaleDetector:
    """The loss scale of fp16 at its floor."""

    def __init__(self, rule: LossScaleRule) -> None:
        self._rule = rule
        self._since: Point | None = None
        self._steps = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.loss_scale is None or point.loss_scale > self._rule.floor:
            self._steps = 0
            return []
        if self._steps == 0:
            self._since = point
        self._steps += 1
        if self._steps != self._rule.persist or self._since is None:
            return []
        return [
            Finding(
                signal="loss_scale_floor",
                tier=Tier.ACT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=f"loss scale at its floor for {self._rule.persist} steps",
                evidence={"loss_scale": point.loss_scale, "floor": self._rule.floor, "loss": point.loss},
            )
        ]


class SaveDetector:
    """Saves that fail. Training goes on, but every step from here on can be lost."""

    def __init__(self) -> None:
        self._failing = False

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.save_error is None:
            self._failing = self._failing and point.save_seconds == 0.0
            return []
        if self._failing:
            return []
        self._failing = True
        return [
            Finding(
                signal="save_failed",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=point.step,
                at=point.ts,
                rule="the trainer says that a checkpoint could not be saved",
                evidence={"error": point.save_error},
            )
        ]
