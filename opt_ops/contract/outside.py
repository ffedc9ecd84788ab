"""What reaches a rank from outside between two updates: requests to save, the fence, drills.

One rank hears such a thing, and all ranks must act on it after the same update. If each rank acted on what itself has
heard, one would wait in the barrier of a save while the others wait for its gradients. So each rank adds a few numbers
to a reduction that the step has anyway, and all ranks act on the sums.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opt_ops.contract.drills import IN_STEP, DrillFile, DrillsOfStep
from opt_ops.contract.errors import UserError
from opt_ops.contract.fence import Fence
from opt_ops.contract.options import Options
from opt_ops.contract.signals import Signals

NUMBERS = ("save", "superseded", "lr_factor", "nan", "flip", "kill", "rank_0")
"""What the numbers of a rank are. All but ``save`` are 0 on other ranks than 0.

``lr_factor`` is NaN if the drills cannot be read. ``flip`` is 1 + the rank. ``kill`` is 1 + the number of the place in
``IN_STEP`` + 8 times the rank. ``rank_0`` is 1: it shows that the numbers were summed.
"""

_PLACES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What all ranks do in an update.

    Attributes:
        save: save a checkpoint after it.
        superseded: end with exit code 83, and save nothing: a newer attempt exists.
        lr_factor: multiply the learning rate by this, for a drill. Otherwise 1.
        nan: the loss must be NaN before the backward pass, for a drill.
        flip: the rank that flips a bit of its weights after the update, for a drill. Trainers without checksums
            ignore it.
        kill: the rank that kills itself in the next update, and the place (``IN_STEP``), for a drill. Of several that
            begin with one update, it is the first. Trainers whose ranks cannot be replaced ignore it.
    """

    save: bool = False
    superseded: bool = False
    lr_factor: float = 1.0
    nan: bool = False
    flip: int | None = None
    kill: tuple[int, str] | None = None


class Outside:
    """What one rank hears.

    Every update: ``sums = all_reduce(outside.local(step))``, then ``outside.agreed(sums)``, before the learning rate is
    set. A single rank passes its own numbers on. A trainer may do this before the forward pass, or after the backward
    pass with the reduction of its loss. In the second case, it asks :meth:`spoils` before the backward pass.

    Args:
        options: of this process.
        rank: of this process.
        signals: made at the start of the process. Without it they are made here.
        newcomer: this process takes the place of a lost rank in a running attempt.

    Attributes:
        signals: of this process.
        fence: read by rank 0 only.

    Raises:
        RuntimeError: without ``signals``, if this is not the main thread.
    """

    def __init__(self, options: Options, rank: int, signals: Signals | None = None, *, newcomer: bool = False) -> None:
        self.signals = signals or Signals()
        self.fence = Fence(options.fence, options.attempt)
        self._rank = rank
        self._drills = DrillFile(options.run_dir / "drill.json", newcomer) if options.run_dir and rank == 0 else None
        self._unreadable: UserError | None = None
        if options.fence:
            self.signals.leave_sigterm_to_supervisor()
        if options.run_dir:
            self.signals.dump_stacks_to(options.run_dir / "stacks" / f"rank-{rank:04d}.txt")

    def local(self, step: int) -> list[float]:
        """The numbers of this rank for update ``step``, to be summed over all ranks, in float32 or float64."""
        save = float(self.signals.save_requested.is_set())
        if self._rank != 0:
            return [save, *[0.0] * (len(NUMBERS) - 1)]
        drills = self._of(step)
        factor = math.nan if drills is None else drills.lr_factor
        nan, flip, kill = (False, None, None) if drills is None else (drills.nan, drills.flip, drills.kill)
        flips = 0.0 if flip is None else 1.0 + flip
        killed = 0.0 if kill is None else 1.0 + _PLACES * kill[0] + IN_STEP.index(kill[1])
        return [save, float(self.fence.superseded), factor, float(nan), flips, killed, 1.0]

    def spoils(self, step: int) -> bool:
        """Whether this rank makes its loss of update ``step`` NaN before the backward pass, for a drill.

        It is true on rank 0 only. In the sums of losses and gradients, the NaN reaches all ranks.
        """
        drills = self._of(step) if self._rank == 0 else None
        return drills is not None and drills.nan

    def agreed(self, sums: Iterable[float]) -> Agreed:
        """What to do, from the sums over all ranks of the numbers of :meth:`local`. It answers all requests so far.

        A request that a rank hears later is in the numbers of its next update.

        Args:
            sums: a list, an array or a tensor.

        Raises:
            UserError: rank 0 cannot read ``drill.json``.
            ValueError: these are no sums over all ranks.
        """
        save, superseded, factor, nan, flip, kill = _checked([float(number) for number in sums])
        if math.isnan(factor):
            raise self._unreadable or UserError("rank 0 cannot read drill.json. The log of rank 0 has the reason.")
        if save:
            self.signals.save_requested.clear()
        return Agreed(
            save=bool(save),
            superseded=bool(superseded),
            lr_factor=factor,
            nan=bool(nan),
            flip=round(flip) - 1 if flip else None,
            kill=_kill_of(round(kill)),
        )

    def check_fence(self) -> None:
        """Rank 0 calls this right before the marker of a checkpoint: ``commit(…, before_marker=outside.check_fence)``.

        Raises:
            SupersededError: a newer attempt exists. The marker must not be written.
        """
        self.fence.check()

    def _of(self, step: int) -> DrillsOfStep | None:
        """The drills of an update, on rank 0; None if they cannot be read."""
        if self._drills is None:
            return DrillsOfStep()
        try:
            return self._drills.at(step)
        except UserError as error:
            self._unreadable = error
            return None


def _kill_of(number: int) -> tuple[int, str] | None:
    rank, place = divmod(number - 1, _PLACES)
    return (rank, IN_STEP[place]) if number else None


def _checked(sums: Sequence[float]) -> Sequence[float]:
    """The sums without the last one, which shows that they are sums."""
    if len(sums) != len(NUMBERS):
        raise ValueError(f"there are {len(sums)} numbers, not {len(NUMBERS)}: pass the sums of Outside.local(step)")
    *numbers, rank_0 = sums
    if rank_0 == 0.0:
        raise ValueError("the numbers of rank 0 are missing: sum those of all ranks")
    if rank_0 != 1.0:
        raise ValueError(f"the number of rank 0 became {rank_0:g}: sum the numbers of all ranks once, do not average")
    return numbers
