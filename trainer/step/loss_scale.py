"""The dynamic loss scale of fp16, with the rule that OPT used."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.recipes import LossScaleConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale of the next loss, and all that decides how it changes. Checkpoints hold all of it.

    The rule is that of metaseq's ``DynamicLossScaler``. An overflow is a gradient norm that is not finite. It halves
    scale and window, if overflows since the last change are frequent enough (``tolerance``). After ``window`` updates
    without overflow, both double. The scale stays at or above its floor. At the floor the window stays, too. In metaseq
    it keeps shrinking there until the scale doubles with every update.

    Attributes:
        scale: what the loss is multiplied by.
        window: updates without overflow until the scale doubles.
        updates: number of updates so far, skipped ones included.
        last_overflow: the update of the last overflow, from 0. −1 before the first overflow.
        last_change: the update at which the scale last changed.
        overflows: number of overflows since the last change.
        at_floor: number of overflows in a row with the scale at its floor.
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
        """The state for a checkpoint, as JSON."""
        return asdict(self)


def first_scale(config: LossScaleConfig) -> LossScale:
    """The state at the start of training."""
    return LossScale(scale=config.initial, window=config.window)


def restored_scale(state: Mapping[str, Any]) -> LossScale:
    """The state that :meth:`LossScale.state` returned."""
    return LossScale(**state)
