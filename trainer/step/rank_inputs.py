"""What reaches a training run from outside, between two updates: requests to save, drills, the fence.

One rank hears of it; all ranks must act on it after the same update. So each brings what it heard into the reduction
that the step has anyway, and all act on the sum.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from opt_ops.contract.fence import Fence
from opt_ops.contract.signals import Signals
from trainer.checkpoint.schedule import Saves
from trainer.errors import SupersededError, UserError
from trainer.parallel.mesh import Layout
from trainer.step import busy_time
from trainer.step.drill import DrillFile
from trainer.telemetry import Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What one rank brings into the reduction of a step.

    Attributes:
        drill_factor: of the learning rate; NaN when the drills cannot be read. Zero on all ranks but rank 0.
        save_requested: whether this rank was asked for a checkpoint, or knows that one is due.
        snapshot_due: whether it is time for a snapshot. Rank 0 alone knows.
        superseded: whether the fence names another attempt. Rank 0 alone looks.
        flip: 1 + the rank that is to flip a bit of its weights, for a drill. Zero on all ranks but rank 0.
        busy_seconds: how long this rank has worked, time that it waited for others not counted
            (:mod:`trainer.step.busy_time`); None, on all ranks, where that is not known.
    """

    drill_factor: float = 0.0
    save_requested: bool = False
    snapshot_due: bool = False
    superseded: bool = False
    flip: int = 0
    busy_seconds: float | None = None


class Outside:
    """One rank's ears."""

    def __init__(
        self,
        run_dir: Path,
        layout: Layout,
        signals: Signals,
        fence: Fence,
        saves: Saves,
        layers: Iterable[nn.Module] = (),
    ) -> None:
        """``layers`` are those whose work is timed on GPUs."""
        self._drills = DrillFile(run_dir / "drill.json") if layout.rank == 0 else None
        self._fence = fence if layout.rank == 0 else None
        self._clock = busy_time.clock(layout, layers)
        self._unreadable: UserError | None = None
        self._signals = signals
        self._saves = saves if layout.rank == 0 else None

    def heard(self, step: int) -> Heard:
        """What there is to act on in update ``step``."""
        return Heard(
            drill_factor=self._drill_factor(step),
            save_requested=self._signals.save_requested.is_set() or bool(self._saves and self._saves.durable(step)),
            snapshot_due=bool(self._saves and self._saves.snapshot(step)),
            superseded=self._fence is not None and self._fence.superseded,
            flip=self._flip(step),
            busy_seconds=self._clock.seconds() if self._clock else None,
        )

    def stop_if_told(self, measured: Measured) -> None:
        """Leave, on all ranks alike, if one of them heard what forbids the update.

        Raises:
            SupersededError: the fence names another attempt.
            UserError: the drills cannot be read.
        """
        if measured.superseded:
            raise SupersededError("superseded: a newer attempt exists; nothing was saved")
        if math.isnan(measured.drill_factor):
            raise self._unreadable or UserError("rank 0 cannot read drill.json; its log says why.")

    def _flip(self, step: int) -> int:
        rank = self._drills.flip(step) if self._drills and self._unreadable is None else None
        return 0 if rank is None else rank + 1

    def _drill_factor(self, step: int) -> float:
        if self._drills is None:
            return 0.0
        try:
            return self._drills.lr_factor(step)
        except UserError as error:
            self._unreadable = error
            return math.nan
