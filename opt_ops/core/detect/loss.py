"""The detector of everything that the loss and the gradient norm of one curve show.

It holds the fast detector, the slow one and the gradient norm's, so that one fault calls for one action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.gradient_norm import GradientNormDetector
from opt_ops.core.detect.loss_level import DriftRule, LevelDetector
from opt_ops.core.detect.loss_spike import SpikeDetector, SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier


class LossDetector:
    """Loss and gradient norm of one curve, in step order."""

    def __init__(self, rule: SpikeRule, drift: DriftRule | None = None) -> None:
        self._rule = rule
        self._spike = SpikeDetector(rule)
        self._gnorm = GradientNormDetector(rule)
        self._level = LevelDetector(drift or DriftRule())
        self._unhealthy: deque[tuple[int, str]] = deque(maxlen=4 * rule.window)
        self._seen = 0  # the newest step
        self._planned: list[int] = []  # steps from which something was planned
        self._due: tuple[Point, ...] = ()

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        self._seen = point.step
        if point.skip == "overflow":  # fp16's loss scale answers for it; its own detector tells when it cannot
            return []
        if not point.finite or point.loss is None:
            self._unhealthy.append((point.step, "not finite"))
            return [self._nonfinite(point)]
        findings = [] if point.gnorm is None else self._gnorm.observe(point, point.gnorm)  # some trainers have none
        if point.gnorm is not None and self._gnorm.out:
            self._unhealthy.append((point.step, "the gradient norm is out of its band"))
        findings += self._spike.observe(point, point.loss, self._level.normal)
        if any(finding.tier is Tier.ACT for finding in findings):
            self._level = self._level.restarted()
        elif slow := self._level.observe(point, point.loss):
            open_spike = self._spike.onset is not None  # one fault is reported once
            findings += [
                f for f in slow if not (open_spike and f.signal == FailureClass.LOSS_DRIFT and f.tier is Tier.ALERT)
            ]
            if any(f.signal == FailureClass.LOSS_DRIFT and f.tier is Tier.ACT for f in slow):
                self._spike.answered()
        if self._spike.onset is not None:
            self._level.spiked()
            self._unhealthy.append((point.step, "the loss is out of its band"))
        elif self._level.risen:
            self._unhealthy.append((point.step, "the loss is above what it had reached"))
        return findings

    def plan(self, step: int) -> None:
        """Something was planned from `step` on: from there, levels and bands are learned anew."""
        self._planned.append(step)

    def begin_attempt(self, due: Sequence[Point]) -> None:
        """An attempt begins with the next point. `due` are the discarded points after its checkpoint, if there are any:
        the loss that they show is due again."""
        self._due = tuple(due)

    @property
    def spiking(self) -> bool:
        """Whether the loss is in a spike."""
        return self._spike.onset is not None

    def open_spike(self, point: Point) -> Finding | None:
        """The spike that is open at `point`, the last one of a run: no step is left in which it could heal."""
        return self._spike.unhealed(point)

    def reason_not_healthy(self, step: int) -> str:
        """Why the state at `step` should not be gone back to; empty if nothing speaks against it."""
        if step > self._seen and self._spike.onset is not None:
            return f"the loss was out of its band at step {self._seen}, and nothing came after that"
        return next((why for bad, why in self._unhealthy if bad == step), "")

    def _nonfinite(self, point: Point) -> Finding:
        onset = self._spike.onset or point
        return Finding(
            signal=FailureClass.NON_FINITE_LOSS,
            tier=Tier.ACT,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule="the loss or the gradient norm is not a finite number",
            evidence={"loss": point.loss, "gnorm": point.gnorm, "lr": point.lr, "bad_module": point.bad_module},
        )
