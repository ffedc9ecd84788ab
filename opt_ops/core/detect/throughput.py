"""How long things take, and what else telemetry tells beside the loss: slow ranks, less throughput, fp16's loss scale,
activations that grow, saves that fail, ranks that do not hold the same."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from opt_ops.core.detect.point import Finding, Point, RobustWindow
from opt_ops.core.values import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class HangRule:
    """How long without progress is too long: `multiple` × the longest of the phase's last times, at least the floor."""

    multiple: float = 2.0
    floor_seconds: float = 30.0
    startup_seconds: float = 900.0  # where nothing is known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerRule:
    """When a rank counts as slow: busy `ratio` times as long as the median rank, in `persist` steps in a row.

    Or `slight` times as long, step after step, until the others have waited for it `waits_seconds` in all: several
    times what moving off its node costs. BLOOM lost 5 % of its throughput to one GPU and found it by hand.
    """

    ratio: float = 1.3
    persist: int = 50
    slight: float = 1.03
    waits_seconds: float = 300.0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRule:
    """When throughput has dropped: the median of `width` points is `drop` below the attempt's best, for as many points.

    Ranks that wait for each other differ by a few per cent from step to step; saves and evaluations are single points,
    which a median passes over. A fifth, for another 32 points, is a machine or a network that has changed.

    A node is behind it when its ranks were the slowest in a `share` of these points, busy `ratio` times as long as the
    median rank: less than what makes a straggler, because here everybody is known to be slower.
    """

    width: int = 32
    drop: float = 0.2
    ratio: float = 1.1
    share: float = 0.75


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
        self._steps = self._clear = 0  # in a row: slower at all, and much slower
        self._waited = 0.0
        self._told = False

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        busy, rule = point.busy, self._rule
        if busy is None or busy.median <= 0 or busy.max < rule.slight * busy.median:
            self._rank = -1
            return []
        if busy.rank != self._rank:
            self._rank, self._since, self._told = busy.rank, point, False
            self._steps, self._clear, self._waited = 0, 0, 0.0
        self._steps += 1
        self._clear = self._clear + 1 if busy.max >= rule.ratio * busy.median else 0
        self._waited += busy.max - busy.median
        costly = self._waited >= rule.waits_seconds and self._steps >= rule.persist
        if self._told or self._since is None or not (costly or self._clear >= rule.persist):
            return []
        self._told = True
        much = f"{rule.ratio:g} times as busy as the median rank for {rule.persist} steps"
        slight = f"slower than the median rank in every step; the others have waited {rule.waits_seconds:g} s for it"
        return [
            Finding(
                signal="straggler",
                tier=Tier.ACT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=much if self._clear >= rule.persist else slight,
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
    """Tokens per second of an attempt, held against the best that it had, and which ranks the others wait for.

    Told again every `width` points while it lasts: a node's reading may come later than the drop that it explains.
    """

    def __init__(self, rule: ThroughputRule) -> None:
        self._rule = rule
        self._window = RobustWindow(rule.width)
        self._slowest: deque[int | None] = deque(maxlen=rule.width)
        self._best = 0.0
        self._since: Point | None = None
        self._low = 0

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        rule, busy = self._rule, point.busy
        self._window.add(point.wps)
        self._slowest.append(busy.rank if busy is not None and busy.max >= rule.ratio * busy.median > 0 else None)
        if len(self._window) < rule.width:
            return []
        now = self._window.median
        self._best = max(self._best, now)
        if now >= (1 - rule.drop) * self._best:
            self._low = 0
            return []
        if self._low == 0:
            self._since = point
        self._low += 1
        if self._low % rule.width or self._since is None:
            return []
        slowest = Counter(rank for rank in self._slowest if rank is not None)
        return [
            Finding(
                signal="throughput_drop",
                tier=Tier.ALERT,
                step=point.step,
                onset_step=self._since.step,
                at=self._since.ts,
                rule=f"tokens per second {rule.drop:.0%} below the attempt's best for {rule.width} points",
                evidence={
                    "wps": now,
                    "best": self._best,
                    "points": rule.width,
                    "slowest": {str(rank): times for rank, times in slowest.most_common(16)},
                },
            )
        ]


SLOWING = frozenset(
    {
        *("power_brake", "thermal_slowdown", "hw_slowdown", "too_hot"),
        *("nvlink_down", "nvlink_errors", "pcie_width", "pcie_generation", "pcie_replays", "port_down", "port_flaps"),
    }
)
"""Reasons of a node's verdict (docs/health.md) for which everybody waits."""


def slow_node(
    found: Mapping[str, Any], nodes: Sequence[str], ranks_per_node: int, readings: Mapping[str, str], share: float
) -> tuple[str, str] | None:
    """The node behind a drop in throughput, and why it is taken for that; None where none stands out.

    A node whose ranks were the slowest in most of the points; else the only one with a reading that slows. Two nodes
    with one are no answer: taking the wrong one out costs a restart and a node.

    Args:
        found: the evidence of a `throughput_drop`.
        nodes: of the attempt, in the order of its ranks.
        ranks_per_node: on each.
        readings: why nodes are not healthy, by node.
        share: of the points in which a node's ranks must have been the slowest.
    """
    waited: Counter[str] = Counter()
    for rank, times in found["slowest"].items():
        waited[nodes[int(rank) // ranks_per_node]] += times
    marked = {node: readings[node] for node in nodes if readings.get(node) in SLOWING}
    for node, times in waited.most_common(1):
        if times >= share * found["points"]:
            also = f", and its reading says {marked[node]}" if node in marked else ""
            return node, f"whose ranks were the slowest in {times} of {found['points']} steps{also}"
    if len(marked) == 1:
        ((node, reason),) = marked.items()
        return node, f"whose reading says {reason}"
    return None


class CorruptionDetector:
    """Ranks that compared what they should hold alike, and found that it is not."""

    def __init__(self, agreed: int) -> None:
        """`agreed` is the step at which they last found no difference: weights of before are not in doubt."""
        self.agreed = agreed

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if point.checksums is None:
            return []
        if not point.checksums.ranks:
            self.agreed = point.step
            return []
        found = point.checksums
        return [
            Finding(
                signal="silent_data_corruption",
                tier=Tier.ACT,
                step=point.step,
                onset_step=self.agreed,
                at=point.ts,
                rule="ranks compared what they should hold alike, and it differs",
                evidence={"ranks": list(found.ranks), "certain": found.certain, "what": found.what},
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
