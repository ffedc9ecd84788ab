"""What reaches a rank from outside between two updates: requests to save, drills, the fence, the save schedule.

One rank sees such an input, and all ranks must act on it after the same update. So each rank adds what it sees to the
all-reduce that the step has anyway, and all ranks act on the sum.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from opt_ops.contract.drills import DrillFile
from opt_ops.contract.fence import Fence, SupersededError
from opt_ops.contract.signals import Signals
from trainer.checkpoint.schedule import SaveSchedules
from trainer.errors import UserError
from trainer.parallel.mesh import Layout
from trainer.step import busy_time
from trainer.step.measured import StepMeasurements


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What one rank adds to the all-reduce of a step.

    Attributes:
        drill_factor: for the learning rate; NaN if the drills cannot be read. 0 on all ranks but rank 0.
        save_requested: whether a signal asked this rank for a checkpoint, or one is due. Rank 0 knows what is due.
        snapshot_due: whether a snapshot is due. Only rank 0 knows.
        superseded: whether the fence names another attempt. Only rank 0 reads it.
        flip: 1 + the rank that flips a bit of its weights, for a drill. 0 on all ranks but rank 0.
        busy_seconds: how long this rank has worked, without its waits for others (:mod:`trainer.step.busy_time`).
            None, on all ranks alike, where that cannot be measured.
    """

    drill_factor: float = 0.0
    save_requested: bool = False
    snapshot_due: bool = False
    superseded: bool = False
    flip: int = 0
    busy_seconds: float | None = None


class RankInputs:
    """The inputs of one rank.

    Args:
        run_dir: the folder of the attempt, where ``drill.json`` may appear.
        layout: for rank and device.
        signals: of this process.
        fence: read by rank 0.
        saves: asked by rank 0.
        layers: the layers whose work is timed on GPUs.
    """

    def __init__(
        self,
        run_dir: Path,
        layout: Layout,
        signals: Signals,
        fence: Fence,
        saves: SaveSchedules,
        layers: Iterable[nn.Module] = (),
    ) -> None:
        self._drills = DrillFile(run_dir / "drill.json") if layout.rank == 0 else None
        self._fence = fence if layout.rank == 0 else None
        self._clock = busy_time.clock(layout, layers)
        self._unreadable: UserError | None = None
        self._signals = signals
        self._saves = saves if layout.rank == 0 else None

    def read(self, step: int) -> StepInputs:
        """The inputs to act on in update ``step``."""
        return StepInputs(
            drill_factor=self._drill_factor(step),
            save_requested=self._signals.save_requested.is_set() or bool(self._saves and self._saves.durable(step)),
            snapshot_due=bool(self._saves and self._saves.snapshot(step)),
            superseded=self._fence is not None and self._fence.superseded,
            flip=self._flip(step),
            busy_seconds=self._clock.seconds() if self._clock else None,
        )

    def raise_if_stopped(self, measured: StepMeasurements) -> None:
        """End this rank, as all others, if an input of any rank forbids the update.

        Raises:
            SupersededError: the fence names another attempt.
            UserError: the drills cannot be read.
        """
        if measured.superseded:
            raise SupersededError("superseded: a newer attempt exists; nothing was saved")
        if math.isnan(measured.drill_factor):
            raise self._unreadable or UserError("rank 0 cannot read drill.json. The log of rank 0 has the reason.")

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
