"""What reaches a rank from outside between two updates: requests to save, drills, the fence, the save schedule.

One rank sees such an input, and all ranks must act on it after the same update. So each rank adds what it sees to the
all-reduce that the step has anyway, and all ranks act on the sum.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from opt_ops.contract.fence import SupersededError
from opt_ops.contract.outside import NUMBERS, Agreed, Outside
from trainer.checkpoint.schedule import SaveSchedules
from trainer.parallel.mesh import Layout
from trainer.step import busy_time


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What one rank adds to the all-reduce of a step.

    Attributes:
        outside: what it has heard (:meth:`opt_ops.contract.outside.Outside.local`).
        save_due: whether a durable checkpoint is due. Only rank 0 knows.
        snapshot_due: whether a snapshot is due. Only rank 0 knows.
        busy_seconds: how long this rank has worked, without its waits for others (:mod:`trainer.step.busy_time`).
            None, on all ranks alike, where that cannot be measured.
    """

    outside: Sequence[float] = (0.0,) * len(NUMBERS)
    save_due: bool = False
    snapshot_due: bool = False
    busy_seconds: float | None = None


class RankInputs:
    """The inputs of one rank.

    Args:
        outside: what it hears.
        layout: for rank and device.
        saves: asked by rank 0.
        layers: the layers whose work is timed on GPUs.
    """

    def __init__(
        self, outside: Outside, layout: Layout, saves: SaveSchedules, layers: Iterable[nn.Module] = ()
    ) -> None:
        self._outside = outside
        self._clock = busy_time.clock(layout, layers)
        self._saves = saves if layout.rank == 0 else None

    def restart(self) -> None:
        """Begin again after a step that was broken off."""
        if self._clock:
            self._clock.restart()

    def spoils(self, step: int) -> bool:
        """Whether this rank makes its loss of update ``step`` NaN before the backward pass, for a drill."""
        return self._outside.spoils(step)

    def read(self, step: int) -> StepInputs:
        """The inputs to act on in update ``step``."""
        return StepInputs(
            outside=self._outside.local(step),
            save_due=self._saves is not None and self._saves.durable(step),
            snapshot_due=self._saves is not None and self._saves.snapshot(step),
            busy_seconds=self._clock.seconds() if self._clock else None,
        )

    def agreed(self, sums: Sequence[float]) -> Agreed:
        """What all ranks do, from the sums of :attr:`StepInputs.outside`.

        Raises:
            SupersededError: the fence names another attempt.
            UserError: the drills cannot be read.
        """
        agreed = self._outside.agreed(sums)
        if agreed.superseded:
            raise SupersededError("superseded: a newer attempt exists; nothing was saved")
        return agreed
