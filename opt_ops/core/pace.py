"""How long things take, and what else telemetry tells beside the loss: slow ranks, less throughput, fp16's loss scale,
activations that grow, saves that fail."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

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
    """When fp16's loss scale is stuck: at or below the floor for `persist` points in a row; or on its way there: `fall`
    times lower than `within` points ago.

    OPT-175B was restarted from checkpoints whose loss scale was still at or above 1 (arXiv 2205.01068, section 2.5). A
    healthy scale is halved once and doubled again, every thousand or two steps; BigScience's 104B fell from 2^20 to
    2^15 within seven. A run's first `warm` points look for their scale from above.
    """

    floor: float = 0.03125  # 2^-5, metaseq's min_loss_scale
    persist: int = 10
    fall: float = 16.0
    within: int = 20
    warm: int = 100


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


class Spent:
    """What the steps since the last account took: for the ledger, which divides the wall clock by it."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._saves = self._evaluations = 0.0

    def step(self, point: Point) -> None:
        """A step of an attempt that is not its first."""
        self._steps.append(max(0.0, point.step_seconds - point.save_seconds))
        self._saves += point.save_seconds

    def evaluation(self, seconds: float) -> None:
        """A scheduled evaluation."""
        self._evaluations += seconds

    def account(self) -> tuple[float | None, float, float]:
        """The median of a step without its saves, what saves held up, and evaluations, in seconds; begins anew."""
        account = (median(self._steps) if self._steps else None, self._saves, self._evaluations)
        self._steps.clear()
        self._saves = self._evaluations = 0.0
        return account


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
    """The loss scale of fp16 at its floor, or falling to it."""

    def __init__(self, rule: LossScaleRule) -> None:
        self._rule = rule
        self._since: Point | None = None
        self._steps = 0
        self._seen = 0
        self._last: deque[tuple[Point, float]] = deque(maxlen=rule.within)

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.loss_scale is None:
            self._steps = 0
            return []
        return [*self._at_floor(point, point.loss_scale), *self._falling(point, point.loss_scale)]

    def _at_floor(self, point: Point, scale: float) -> list[Finding]:
        if scale > self._rule.floor:
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
                evidence={"loss_scale": scale, "floor": self._rule.floor, "loss": point.loss},
            )
        ]

    def _falling(self, point: Point, scale: float) -> list[Finding]:
        self._seen += 1
        self._last.append((point, scale))
        if self._seen <= self._rule.warm:
            return []
        highest = max(self._last, key=lambda each: (each[1], each[0].step))
        if scale * self._rule.fall > highest[1]:
            return []
        self._last.clear()  # told once for each time that it falls so far
        return [
            Finding(
                signal="loss_scale_falling",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=highest[0].step,
                at=highest[0].ts,
                rule=f"loss scale {self._rule.fall:g} times lower within {self._rule.within} points",
                evidence={"loss_scale": scale, "before": highest[1], "loss": point.loss},
            )
        ]


class ThroughputDetector:
    """Tokens per second of an attempt, held against the best that it had: the median of 32 points loses a fifth.

    Ranks that wait for each other differ by a few per cent from step to step; saves and evaluations are single points,
    which a median passes over. A fifth, for another 32 points, is a machine or a network that has changed.
    """

    WIDTH = 32
    LOSS = 0.2

    def __init__(self) -> None:
        self._window = RobustWindow(self.WIDTH)
        self._best = 0.0
        self._since: Point | None = None
        self._low = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        self._window.add(point.wps)
        if len(self._window) < self.WIDTH:
            return []
        now = self._window.median
        self._best = max(self._best, now)
        if now >= (1 - self.LOSS) * self._best:
            self._low = 0
            return []
        if self._low == 0:
            self._since = point
        self._low += 1
        if self._low != self.WIDTH or self._since is None:
            return []
        return [
            Finding(
                signal="throughput_drop",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=f"tokens per second {self.LOSS:.0%} below the attempt's best for {self.WIDTH} points",
                evidence={"wps": now, "best": self._best},
            )
        ]


class ActivationDetector:
    """Activations that grow by half within 512 points: OPT-175B's 12.43 and 12.45.2 were ended by such a drift.

    They grow in healthy runs too, over tens of thousands of steps, and fast while the learning rate warms up: the first
    1024 points only teach what is usual. The scale does not matter, only ratios do.
    """

    WIDTH = 64
    BACK = 512
    RATIO = 1.5
    WARM = 1024

    def __init__(self) -> None:
        self._window = RobustWindow(self.WIDTH)
        self._levels: deque[tuple[Point, float]] = deque(maxlen=self.BACK // self.WIDTH)
        self._seen = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.actv_norm is None:
            return []
        self._seen += 1
        self._window.add(point.actv_norm)
        if self._seen % self.WIDTH:
            return []
        now = self._window.median
        lowest = min(self._levels, key=lambda each: each[1], default=(point, now))
        self._levels.append((point, now))
        if self._seen <= self.WARM or now <= self.RATIO * lowest[1]:
            return []
        self._levels.clear()
        return [
            Finding(
                signal="activation_norm",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=lowest[0].step,
                at=lowest[0].ts,
                rule=f"median of {self.WIDTH} points above {self.RATIO:g} times its lowest in {self.BACK} points",
                evidence={"actv_norm": now, "lowest": lowest[1], "loss": point.loss, "gnorm": point.gnorm},
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
