"""What reaches a rank from outside between two updates: requests to save, the fence, drills.

One rank hears such a thing, and all ranks must act on it after the same update. If each rank acted on what itself has
heard, one would wait in the barrier of a save while the others wait for its gradients. So each rank adds a few numbers
to a reduction that the step has anyway, and all ranks act on the sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opt_ops.contract.drills import DrillFile
from opt_ops.contract.errors import UserError
from opt_ops.contract.fence import Fence
from opt_ops.contract.options import Options
from opt_ops.contract.signals import Signals


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What all ranks do in an update.

    Attributes:
        save: save a checkpoint after it.
        superseded: end with exit code 83, and save nothing: a newer attempt exists.
        lr_factor: multiply the learning rate by this, for a drill. Otherwise 1.
        nan: replace the loss by NaN before the backward pass, for a drill.
        flip: the rank that flips a bit of its weights after the update, for a drill. Trainers without checksums
            ignore it.
    """

    save: bool = False
    superseded: bool = False
    lr_factor: float = 1.0
    nan: bool = False
    flip: int | None = None


class Outside:
    """What one rank hears.

    Every update, before its learning rate is set: ``sums = all_reduce(outside.local(step))``, then
    ``outside.agreed(sums)``. A single rank passes its own numbers on.

    Args:
        options: of this process.
        rank: of this process.
        signals: made at the start of the process. Without it they are made here.
    """

    def __init__(self, options: Options, rank: int, signals: Signals | None = None) -> None:
        self.signals = signals or Signals()
        self._rank = rank
        self._fence = Fence(options.fence, options.attempt)
        self._drills = DrillFile(options.run_dir / "drill.json") if options.run_dir and rank == 0 else None
        self._unreadable: UserError | None = None
        if options.fence:
            self.signals.leave_sigterm_to_supervisor()
        if options.run_dir:
            self.signals.dump_stacks_to(options.run_dir / "stacks" / f"rank-{rank:04d}.txt")

    def local(self, step: int) -> list[float]:
        """The numbers of this rank for update ``step``, to be summed over all ranks."""
        save = float(self.signals.save_requested.is_set())
        if self._drills is None:
            return [save, 0.0, 0.0, 0.0, 0.0]
        try:
            factor = self._drills.lr_factor(step)
        except UserError as error:
            self._unreadable, factor = error, math.nan
        flip = self._drills.flip(step)
        superseded = float(self._fence.superseded)
        return [save, superseded, factor, float(self._drills.nan(step)), 0.0 if flip is None else 1.0 + flip]

    def agreed(self, sums: Sequence[float]) -> Agreed:
        """What to do, from the sums over all ranks of the numbers of :meth:`local`. It answers all requests so far.

        Raises:
            UserError: rank 0 cannot read ``drill.json``.
        """
        save, superseded, factor, nan, flip = sums
        if math.isnan(factor):
            raise self._unreadable or UserError("rank 0 cannot read drill.json. The log of rank 0 has the reason.")
        if save:
            self.signals.save_requested.clear()
        return Agreed(
            save=bool(save),
            superseded=bool(superseded),
            lr_factor=factor or 1.0,
            nan=bool(nan),
            flip=int(flip) - 1 if flip else None,
        )

    def check_fence(self) -> None:
        """Rank 0 calls this right before the marker of a checkpoint: ``commit(…, before_marker=outside.check_fence)``.

        Raises:
            SupersededError: a newer attempt exists. The marker must not be written.
        """
        self._fence.check()
