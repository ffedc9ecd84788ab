"""Ranks that do not hold the same values."""

from __future__ import annotations

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier


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
                signal=FailureClass.SILENT_DATA_CORRUPTION,
                tier=Tier.ACT,
                step=point.step,
                onset_step=self.agreed,
                at=point.ts,
                rule="ranks compared what they should hold alike, and it differs",
                evidence={"ranks": list(found.ranks), "certain": found.certain, "what": found.what},
            )
        ]
