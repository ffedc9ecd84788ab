"""A rank that is slower than the others."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier


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
                signal=FailureClass.STRAGGLER,
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
