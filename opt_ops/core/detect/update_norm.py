"""Updates that grow although the learning rate does not: the second moment no longer fits the gradients."""

from __future__ import annotations

import math

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.growth import Growths
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import AlertSignal
from opt_ops.core.values import Tier


class UpdateNormDetector:
    """The norm of the applied update of each block, divided by the learning rate that explains it.

    Adam divides gradients by their own usual size. So this ratio hardly depends on the gradients while their size is
    usual. Warm-up and decay do not change it. Once warm-up has ended, a learning rate above its peak explains nothing:
    updates that become larger than they ever were are what breaks training, whatever makes them so.
    """

    def __init__(self) -> None:
        self._growths = Growths()
        self._before: Point | None = None
        self._peak = 0.0  # of the warm-up
        self._warm = False

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known. The norms of a line are those of the update before it."""
        before, self._before = self._before, point
        if before is not None:
            self._warm = self._warm or point.lr <= before.lr
        if not self._warm:
            self._peak = point.lr
        used = before if before is not None and before.step == point.step - 1 else point
        explained = min(used.lr, self._peak)
        if explained <= 0:
            return []
        norms = point.block_unorms or {}
        logarithms = {block: math.log(norm / explained) for block, norm in norms.items() if norm > 0}
        grown = self._growths.observe(point, logarithms)
        if grown is None:
            return []
        return [
            Finding(
                signal=AlertSignal.UPDATE_NORM,
                tier=Tier.ALERT,
                step=point.step,
                onset_step=grown.since.step,
                at=grown.since.ts,
                rule=f"update norm / lr of a block above its usual path, by a summed evidence of {grown.enough:.0f} sd",
                evidence={
                    "block": grown.block,
                    "times_usual": math.exp(grown.value - grown.usual),
                    "unorm": norms[grown.block],
                    "lr": point.lr,
                    "loss": point.loss,
                    "gnorm": point.gnorm,
                },
            )
        ]
