"""What reaches a training run from outside, between two updates: requests to save, drills, the fence.

One rank hears of it; all ranks must act on it after the same update. So each brings what it heard into the reduction
that the step has anyway, and all act on the sum.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.drill import DrillFile
from trainer.errors import SupersededError, UserError
from trainer.fence import Fence
from trainer.signals import Signals
from trainer.telemetry import Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What one rank brings into the reduction of a step.

    Attributes:
        drill_factor: of the learning rate; NaN when the drills cannot be read. Zero on all ranks but rank 0.
        save_requested: whether this rank was asked for a checkpoint.
        superseded: whether the fence names another attempt. Rank 0 alone looks.
    """

    drill_factor: float = 0.0
    save_requested: bool = False
    superseded: bool = False


class Outside:
    """One rank's ears."""

    def __init__(self, run_dir: Path, rank: int, signals: Signals, fence: Fence) -> None:
        self._drills = DrillFile(run_dir / "drill.json") if rank == 0 else None
        self._fence = fence if rank == 0 else None
        self._unreadable: UserError | None = None
        self._signals = signals

    def heard(self, step: int) -> Heard:
        """What there is to act on in update ``step``."""
        return Heard(
            drill_factor=self._drill_factor(step),
            save_requested=self._signals.save_requested.is_set(),
            superseded=self._fence is not None and self._fence.superseded,
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

    def _drill_factor(self, step: int) -> float:
        if self._drills is None:
            return 0.0
        try:
            return self._drills.lr_factor(step)
        except UserError as error:
            self._unreadable = error
            return math.nan
