"""What the attempts of a check were asked to do, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opt_ops.core.values import Skip
from opt_ops.trainer_check.findings import Finding
from opt_ops.trainer_check.records import Ran

LAST = 22  # the last step; no multiple of the next, so that it is saved for being the last
EVERY = 6
MIDDLE = 12
FACTOR = 0.5
FROZEN = 1e-9  # a factor with which weights stay what they are, so that a loss depends on its batch alone
NAN_AT = 7
HUGE = 1e30
EARLY = ((3, 4), (4, 6))  # windows that overlap; four batches are left out from update 3 on
EARLY_AS_ONE = ((3, 6),)
UNKNOWN_SETTING = "no_trainer_has_this_setting=1"


Windows = tuple[tuple[int, int], ...]


def late_windows(middle: int) -> Windows:
    """Windows that overlap, ahead of the checkpoint that is resumed: they begin with the batch of its second update."""
    first = middle + 2 + 4
    return ((first, first + 1), (first + 1, first + 3))


def late_one_by_one(middle: int) -> Windows:
    """The same batches, each as a window of its own: a trainer that is off by one at an end leaves out others."""
    first = middle + 2 + 4
    return tuple((batch, batch) for batch in range(first, first + 4))


def as_skips(*windows: tuple[int, int]) -> Sequence[Skip]:
    """Windows as the core names them."""
    return [Skip(first=first, last=last) for first, last in windows]


@dataclass(slots=True)
class Seen:
    """All that was seen. An attempt that was not made is missing.

    Attributes:
        ranks: The numbers of ranks, ascending.
        middle: By number of ranks: the step of the save that is resumed.
        runs: Attempts by their name.
        acts: What was judged on the spot, by promise.
        watched: The steps whose saves were watched in slow motion.
        late_lines: What was wrong with telemetry while all ranks were stopped. Empty: nothing.
    """

    ranks: tuple[int, ...]
    middle: dict[int, int] = field(default_factory=dict[int, int])
    runs: dict[str, Ran] = field(default_factory=dict[str, Ran])
    acts: dict[str, Finding] = field(default_factory=dict[str, Finding])
    late_lines: str = ""
    watched: list[int] = field(default_factory=list[int])

    @property
    def most(self) -> int:
        """The largest number of ranks."""
        return self.ranks[-1]

    @property
    def least(self) -> int:
        """The smallest number of ranks."""
        return self.ranks[0]

    def base(self, world: int) -> Ran | None:
        """The attempt without interruption on this number of ranks."""
        return self.runs.get(f"base_{world}")

    def middle_of(self, world: int) -> int:
        """The step after which attempts differ from the one without interruption."""
        return self.middle.get(world, MIDDLE)

    def checkpoint(self, world: int, step: int | None = None) -> Path | None:
        """A save of it: of a step, else the one in the middle."""
        base = self.base(world)
        saved = dict(base.saved) if base else {}
        return saved.get(self.middle.get(world, -1) if step is None else step)
