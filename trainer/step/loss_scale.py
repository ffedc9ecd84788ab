"""Which number formats forward and backward pass use, and fp16's dynamic loss scale, as OPT had it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from trainer.recipes import LossScaleConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale of the next update's loss, and all that decides how it goes on: the whole of it is in checkpoints.

    The rule is that of metaseq's ``DynamicLossScaler``. An overflow, which is a gradient norm that is not finite,
    halves scale and window, once the share of overflows since the last change has reached the tolerance. ``window``
    updates after the last overflow both double. Below the floor the scale does not go; there, unlike in metaseq, whose
    window goes on shrinking until the scale doubles with every update, the window stays as well.

    Attributes:
        scale: what the loss is multiplied by.
        window: updates without overflow until the scale doubles.
        updates: seen so far, skipped ones included.
        last_overflow: the update of the last overflow, from 0; −1 before the first.
        last_change: the update at which the scale last changed.
        overflows: since then.
        at_floor: overflows in a row that found the scale at its floor.
    """

    scale: float
    window: int
    updates: int = 0
    last_overflow: int = -1
    last_change: int = -1
    overflows: int = 0
    at_floor: int = 0

    def after(self, *, overflow: bool, config: LossScaleConfig) -> "LossScale":
        """The state after one more update."""
        if not overflow:
            counted = replace(self, updates=self.updates + 1, at_floor=0)
            if (self.updates - self.last_overflow) % self.window:
                return counted
            return replace(counted, scale=2 * self.scale, window=2 * self.window, last_change=self.updates)
        overflows = self.overflows + 1
        counted = replace(self, updates=self.updates + 1, last_overflow=self.updates, overflows=overflows)
        if overflows < config.tolerance * (self.updates - self.last_change):
            return counted
        counted = replace(counted, last_change=self.updates, overflows=0)
        if self.scale / 2 < config.floor:
            return replace(counted, at_floor=self.at_floor + 1)
        return replace(counted, scale=self.scale / 2, window=max(1, self.window // 2))

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def first_scale(config: LossScaleConfig) -> LossScale:
    """What training begins with."""
    return LossScale(scale=config.initial, window=config.window)


def restored_scale(state: Mapping[str, Any]) -> LossScale:
    """What :meth:`LossScale.state` told."""
    return LossScale(**state)
