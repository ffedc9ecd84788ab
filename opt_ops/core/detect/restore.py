"""Whether the first points of an attempt continue the loss that was reached."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.noise import Scale
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier

_CLIP = 6.0  # sd that a point says, at most: no single one decides
_SLACK = 1.5  # sd that a point may be off
_BOUND = 12.0  # evidence: three points that are far off, eight that are 3 sd off
_FIRST = 64  # points of an attempt that are compared
_HUGE_SD, _HUGE_SHARE = 20.0, 0.2  # of the noise, and of the loss: moments that warm up do not raise it so far
_BUMP = 300.0  # n^1.5 points over the sd of the height: then the end of a short bump would be seen


class RestoreCheck:
    """Compares the first points of an attempt with what was due."""

    def __init__(self, reached: float, progress: float, scale: Scale, due: Sequence[Point]) -> None:
        """`reached`: the level before the attempt; `progress`: by how much it fell in as many points as a level has."""
        self._reached, self._progress, self._scale = reached, max(0.0, progress), scale
        self._due = {point.step: point for point in due}
        self._off: list[float] = []
        self._up = self._down = 0.0
        self.first: Point | None = None

    @property
    def over(self) -> bool:
        """Whether the attempt's first points have passed."""
        return len(self._off) >= _FIRST

    def observe(self, point: Point, loss: float) -> Finding | None:
        """Take in the attempt's next point; a finding if the restore was bad."""
        self.first = self.first or point
        scale = self._scale
        sd = (scale.sd * scale.spread) * (1 + scale.factor(8) / 8) ** 0.5
        due = self._due.get(point.step)
        due_loss = self._reached if due is None or due.loss is None else due.loss
        above = loss - max(self._reached, min(due_loss, self._reached + 3 * sd))
        below = min(self._reached - self._progress * (1 + len(self._off) / 8), due_loss) - loss
        self._off.append(above)
        self._up = max(0.0, self._up + min(_CLIP, above / sd) - _SLACK)
        self._down = max(0.0, self._down + min(_CLIP, below / sd) - _SLACK)
        evidence: dict[str, Any] = {"loss": loss, "due": due_loss, "reached": self._reached, "sd": sd, "lr": point.lr}
        if due is not None and due.lr:
            evidence["lr_due"] = due.lr
        jump = median(self._off[:3])
        huge = jump > max(_HUGE_SD * sd, _HUGE_SHARE * abs(self._reached))
        seen = len(self._off) >= (_BUMP * sd / max(above, sd)) ** (2 / 3)
        if self._up >= _BOUND and jump > 3 * sd and (huge or (seen and not self._returns())):
            return self._finding(point, evidence, f"{above:.3g} above the loss that was reached")
        if self._down >= _BOUND and len(self._off) <= _FIRST // 2:
            return self._finding(point, evidence, f"{below:.3g} below the loss that was due: data that was seen before")
        return None

    def _returns(self) -> bool:
        """A short bump while moments warm up: at its pace it is over in as many points as an attempt's first are."""
        off, n = self._off, len(self._off)
        third = max(1, n // 3)
        falls = (median(off[:third]) - median(off[-third:])) / max(1, n - third)
        noise = 2 * self._scale.sd * self._scale.spread * (2 / third) ** 0.5 / max(1, n - third)
        return falls > noise and off[-1] / falls <= max(16, _FIRST // 2 - n)

    def _finding(self, point: Point, evidence: dict[str, Any], text: str) -> Finding:
        assert self.first is not None
        interval = (point.step - self.first.step) // max(1, len(self._off) - 1)
        return Finding(
            signal=FailureClass.BAD_RESTORE,
            tier=Tier.ACT,
            step=point.step,
            onset_step=self.first.step,
            at=self.first.ts,
            rule=f"the attempt's first {len(self._off)} points are {text}",
            evidence=evidence,
            margin_steps=interval + 1,  # its checkpoint is within an interval before its first line, and is not sound
        )
