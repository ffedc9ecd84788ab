"""Adds up evidence for and against causes."""

from __future__ import annotations

import math
from collections import defaultdict

from opt_ops.core.failures.causes import Cause, Suspicion
from opt_ops.core.text import printable

_NOT_THOUGHT_OF = 1.5
"""The weight of a cause that nobody thought of: one fair piece of evidence."""


class Board:
    """Weights of causes, each with the sentences behind it."""

    def __init__(self) -> None:
        self._weights: defaultdict[Cause, float] = defaultdict(float)
        self._for: defaultdict[Cause, list[str]] = defaultdict(list)
        self._against: defaultdict[Cause, list[str]] = defaultdict(list)

    def add(self, cause: Cause, weight: float, why: str) -> None:
        """Count evidence: for the cause if the weight is positive, else against it. `why` may be untrusted."""
        self._weights[cause] += weight
        (self._for if weight > 0 else self._against)[cause].append(printable(why))

    def add_if(self, there: bool, cause: Cause, weight: float, why: str) -> None:
        """Count a piece of evidence if it is there."""
        if there:
            self.add(cause, weight, why)

    def suspicions(self) -> tuple[Suspicion, ...]:
        """The causes for which something speaks, the likeliest first, with their shares of all weights."""
        shares = {cause: math.exp(weight) for cause, weight in self._weights.items() if self._for[cause]}
        whole = sum(shares.values()) + math.exp(_NOT_THOUGHT_OF)
        ordered = sorted(shares, key=lambda cause: -shares[cause])
        return tuple(
            Suspicion(
                cause=cause,
                confidence=round(shares[cause] / whole, 3),
                evidence_for=tuple(self._for[cause]),
                evidence_against=tuple(self._against[cause]),
            )
            for cause in ordered
        )
