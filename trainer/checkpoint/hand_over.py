"""After a loss: agree on a version that all ranks have, and send it to those that lack it.

All functions are collective over the group of the new members. If one raises, another member was lost. What was whole
before is still whole, so the next generation can begin again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.checkpoint.versions import Key, Sending, Slots, Version, receive


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank holds, with the right checksums.

    Attributes:
        own: versions of itself.
        wards: versions of each ward.
        fresh: it has never held a version of itself: it is new, or it was new in a generation that never began.
    """

    own: frozenset[Key]
    wards: Mapping[int, frozenset[Key]]
    fresh: bool

    @classmethod
    def of(cls, own: Sequence[Version], wards: Mapping[int, Sequence[Version]], *, fresh: bool) -> "Holding":
        """The holding with these whole versions."""
        return cls(
            own=frozenset(version.key for version in own),
            wards={rank: frozenset(version.key for version in held) for rank, held in wards.items()},
            fresh=fresh,
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """Rank ``source`` sends the version of rank ``owner`` to rank ``target``."""

    owner: int
    source: int
    target: int


def agree(holding: Holding, group: dist.ProcessGroup) -> tuple[Key, list[Holding]] | None:
    """The newest version that all have, and what each rank holds. None, on all ranks alike, if there is none.

    Args:
        holding: of this rank.
        group: of all ranks.
    """
    holdings: list[Holding] = [holding] * group.size()
    dist.all_gather_object(holdings, holding, group=group)
    key = common(holdings)
    return None if key is None else (key, holdings)


def common(holdings: Sequence[Holding]) -> Key | None:
    """The newest version that every survivor has of itself, and a buddy has of every fresh rank.

    A version of a later generation is newer. Its steps were made again, after an earlier common version. A survivor
    whose own versions are damaged gets none from its buddy: its memory is not to be trusted.
    """
    had = [_holders(rank, holdings).keys() if held.fresh else held.own for rank, held in enumerate(holdings)]
    return max(frozenset.intersection(*map(frozenset, had)), default=None)


def to_new(key: Key, holdings: Sequence[Holding]) -> list[Transfer]:
    """What gives each fresh rank its own version ``key``."""
    return [Transfer(rank, _holders(rank, holdings)[key], rank) for rank, held in enumerate(holdings) if held.fresh]


def to_buddies(key: Key, holdings: Sequence[Holding], buddies: Sequence[int | None]) -> list[Transfer]:
    """What gives each buddy the version ``key`` of its ward, where it lacks it."""
    return [
        Transfer(rank, rank, buddy)
        for rank, buddy in enumerate(buddies)
        if buddy is not None and key not in holdings[buddy].wards.get(rank, ())
    ]


def hand_over(
    transfers: Sequence[Transfer],
    key: Key,
    slots_of: Callable[[int], Slots],
    group: dist.ProcessGroup,
    generation: int,
) -> bool:
    """Make this rank's part of the transfers, and wait for those of the others.

    Args:
        transfers: the same on all ranks. Between two ranks there is at most one in each direction.
        key: the version.
        slots_of: this rank's memory for the versions of a rank.
        group: of all ranks.
        generation: of the new members.

    Returns:
        Whether all of it has arrived with the right checksums: on all ranks alike.

    Raises:
        RuntimeError: a peer was lost.
    """
    rank, good = group.rank(), True
    sending: list[Sending] = []
    for transfer in transfers:
        if transfer.source == rank:
            slot = slots_of(transfer.owner).find(key)
            assert slot is not None, "this rank has told that it holds the version"
            sending.append(Sending(slot, transfer.target, group, generation))
    for transfer in transfers:
        if transfer.target == rank:
            good &= receive(slots_of(transfer.owner), transfer.source, group, generation, key).good
    for each in sending:
        each.wait()
    damaged = torch.tensor([float(not good)])
    dist.all_reduce(damaged, dist.ReduceOp.MAX, group=group)
    return not damaged.item()


def _holders(rank: int, holdings: Sequence[Holding]) -> dict[Key, int]:
    """For each version of ``rank`` that another rank holds: that rank."""
    return {key: holder for holder, held in enumerate(holdings) for key in held.wards.get(rank, ())}
