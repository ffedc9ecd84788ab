"""Throughput that drops, and the node behind it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opt_ops.core.detect.finding import Finding, RobustWindow
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier


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
        if point.wps <= 0:  # not known
            return []
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
                signal=FailureClass.THROUGHPUT_DROP,
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


def slow_node(
    found: Mapping[str, Any], nodes: Sequence[str], ranks_per_node: int, slowing: Mapping[str, str], share: float
) -> tuple[str, str] | None:
    """The node behind a throughput drop, and the reason for this choice; None if no node stands out.

    It is the node whose ranks were the slowest in most of the points, else the only one with a reading that slows. With
    two such nodes there is no answer: to exclude the wrong one costs a restart and a node.

    Args:
        found: the evidence of a `throughput_drop`.
        nodes: of the attempt, in the order of its ranks.
        ranks_per_node: on each.
        slowing: nodes with a reading for which every rank waits, each with its reason (`health.findings.SLOWING`).
        share: of the points in which a node's ranks must have been the slowest.
    """
    waited: Counter[str] = Counter()
    for rank, times in found["slowest"].items():
        if (place := int(rank) // ranks_per_node) < len(
            nodes
        ):  # the attempt may not have a rank that its trainer names
            waited[nodes[place]] += times
    for node, times in waited.most_common(1):
        if times >= share * found["points"]:
            also = f", and its reading says {slowing[node]}" if node in slowing else ""
            return node, f"whose ranks were the slowest in {times} of {found['points']} steps{also}"
    if len(slowing) == 1:
        ((node, reason),) = slowing.items()
        return node, f"whose reading says {reason}"
    return None
