"""Checksums against silent data corruption: compare what several ranks must hold alike, or one rank unchanged.

FSDP2 shards parameters and moments over all data-parallel ranks. So each shard is on one rank, and there is no replica
to compare it with. Four things can still be compared:

- The shards of a rank, at rest. Nothing writes them between two updates, so their checksum after one update must equal
  that before the next. A difference names the rank.
- The gathered parameters. All data-parallel ranks of one tensor-parallel rank get the same bits. The rank that differs
  is wrong.
- Shards that the mesh replicates: layer norms, positions and some biases over tensor-parallel ranks; everything over
  replicas, where there are any. If two differ, nothing says which is wrong. But tensor-parallel ranks usually share a
  node.
- The step counters of the optimizer and the position in the data, which are equal on all ranks.

Two faults stay unseen. If a GPU computes a shard wrongly in the update, all ranks gather the same wrong shard. A wrong
matrix product cannot be compared: kernels may be tuned per rank, so their sums may differ in the last bit.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.parallel.mesh import Layout

_MASK = 2**52 - 1  # what a float64 of the step's reduction holds exactly
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class ChecksumVerdict:
    """The result of a comparison.

    Attributes:
        ranks: the ranks whose data is wrong; empty if all agree.
        certain: False if no majority agrees. Then ``ranks`` holds all ranks that were compared.
        what: which of their data is wrong.
    """

    ranks: tuple[int, ...] = ()
    certain: bool = True
    what: str = ""


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A checksum over all bits of ``tensors``: below 2⁵², as an int64 scalar on their device.

    Any single flipped bit changes it, in values of up to four bytes. The words of each tensor are summed as integers,
    so their order does not matter. The sums get odd weights, because an odd multiple of a power of two below 2⁵² is
    never 0 modulo 2⁵².
    """
    sums = [each.view(_INTEGERS[each.element_size()]).sum(dtype=torch.int64) for each in map(_local, tensors)]
    stacked = torch.stack(sums)
    weights = torch.arange(1, 2 * len(sums), 2, device=stacked.device)
    return (stacked * weights).sum() & _MASK


class Checksums:
    """The checksums of one rank: computed after the start and after every ``every``-th update, compared one step later.

    Nothing here waits for the GPU: the values travel in the all-reduce that the step has anyway.

    Args:
        model: the sharded model.
        optimizer: over its parameters, with allocated state.
        layout: says which ranks must hold the same.
        every: updates between two comparisons; 0 turns them off.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layout: Layout, every: int) -> None:
        self._model = model
        self._held = [(p, state) for p, state in optimizer.state.items() if "exp_avg" in state]
        self._every = every
        self._dp, self._tp, self._rank = layout.dp, layout.tp, layout.rank
        self._replicated = _replicated([p for p, _ in self._held])
        self._at_rest = self._own() if every else None

    def updated(self, step: int, flip: int | None) -> None:
        """Note that update ``step`` was applied.

        Args:
            step: number of the update.
            flip: the rank that flips a bit of its weights now, for a drill. The checksums before it are kept.
        """
        if self._every and (step % self._every == 0 or flip is not None):
            self._at_rest = self._own()
            if flip == self._rank:
                flip_bit(max((_local(p) for p, _ in self._held), key=Tensor.numel))

    def restored(self) -> None:
        """Begin again, on all ranks, because the state was replaced by that of a copy."""
        self._at_rest = self._own() if self._every else None

    def values_to_compare(self, position: int) -> Tensor | None:
        """The values that this rank adds to the all-reduce: a few float64. None, on all ranks, if none are due.

        Args:
            position: index in the data of the first sample of this step.
        """
        if self._at_rest is None:
            return None
        counters, gathered = checksum(state["step"] for _, state in self._held) + position, self._gathered()
        parts = [self._own() != self._at_rest, counters, gathered]
        parts += [self._own(indices) for indices, _ in self._replicated]
        self._at_rest = None
        # With offload, a rank's own shards are on the host, and gathered parameters on the GPU.
        return torch.stack([part.double().to(gathered.device) for part in parts])

    def judge(self, values_by_rank: Sequence[Sequence[float]]) -> ChecksumVerdict | None:
        """Compare the values of all ranks. None if there are none. All ranks come to the same verdict."""
        if not values_by_rank:
            return None
        changed, counters, gathered, *replicated = zip(*values_by_rank, strict=True)
        if any(changed):
            ranks = tuple(rank for rank, each in enumerate(changed) if each)
            return ChecksumVerdict(ranks, True, "its own shards changed between two updates")
        all_ranks = [list(range(self._dp * self._tp))]
        columns = [[rank * self._tp + column for rank in range(self._dp)] for column in range(self._tp)]
        comparisons = [
            (counters, all_ranks, "its step counters or its position in the data differ from those of other ranks"),
            (gathered, columns, "its gathered parameters differ from those of the other data-parallel ranks"),
        ]
        for values, (_, groups) in zip(replicated, self._replicated, strict=True):
            comparisons.append((values, groups, "its replicated shards differ from those of other ranks"))
        for values, groups, what in comparisons:
            odd, certain = _odd(values, groups)
            if odd:
                return ChecksumVerdict(odd, certain, what)
        return ChecksumVerdict()

    def _own(self, indices: Iterable[int] | None = None) -> Tensor:
        """The checksum of this rank's shards of parameters and moments: of all of them, or of some."""
        held = self._held if indices is None else [self._held[index] for index in indices]
        return checksum(each for p, state in held for each in (p, state["exp_avg"], state["exp_avg_sq"]))

    def _gathered(self) -> Tensor:
        """The checksum of the gathered parameters. They are gathered for this, layer by layer."""
        gatherers = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        if not gatherers:
            return checksum(self._model.parameters())
        sums = []
        for module in gatherers:
            module.unshard()
            sums.append(checksum(_own_parameters(module)))
            module.reshard()
        return checksum(sums)


def flip_bit(tensor: Tensor) -> None:
    """Flip the highest bit of the mantissa in the middle float32 of ``tensor``, in place: wrong, but no outlier."""
    words = tensor.view(torch.int32).view(-1)
    words[len(words) // 2] ^= 1 << 22


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``module`` gathers itself, without those of the FSDP modules inside it."""
    children = (child for child in module.modules() if child is not module and isinstance(child, FSDPModule))
    theirs = {p for child in children for p in child.parameters()}
    return [p for p in module.parameters() if p not in theirs]


def _replicated(parameters: Sequence[Tensor]) -> list[tuple[list[int], list[list[int]]]]:
    """For each dimension of the mesh: the parameters that it replicates, and the groups of ranks that hold the same."""
    indices: dict[int, list[int]] = {}
    mesh = None
    for index, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_replicate() and mesh.size(dimension) > 1:
                    indices.setdefault(dimension, []).append(index)
    if mesh is None:
        return []
    ranks = mesh.mesh
    return [(found, ranks.movedim(d, -1).reshape(-1, ranks.shape[d]).tolist()) for d, found in sorted(indices.items())]


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _odd(values: Sequence[float], groups: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], bool]:
    """The ranks that differ from the majority of their group, and whether every group had a majority."""
    odd: list[int] = []
    certain = True
    for group in groups:
        (most, count), *others = Counter(values[rank] for rank in group).most_common()
        if not others:
            continue
        majority = 2 * count > len(group)
        certain = certain and majority
        odd += [rank for rank in group if not majority or values[rank] != most]
    return tuple(odd), certain
