"""Silent data corruption: is what several ranks hold alike still alike, and what one rank holds alone still the same?

FSDP2 shards parameters and moments over all data-parallel ranks: each rank holds its part alone, and there is no
replica to compare it with. Four things are left that can be compared, and each names a rank in its own way:

- a rank's own shards, at rest: nothing writes them between two updates, so their checksum after one must be theirs
  before the next. A difference names the rank by itself;
- the parameters as they are computed with, gathered: every data-parallel rank of one tensor-parallel rank gets the
  same bits. The odd one is wrong;
- shards that the mesh replicates: layer norms, positions and some biases over tensor-parallel ranks; everything over
  replicas, where sharding has any. Two that differ cannot say which is wrong, but tensor-parallel ranks share a node
  as a rule;
- the optimizer's step counters and the place in the data: alike everywhere.

A shard that a GPU computed wrongly in the update itself is gathered alike by everybody, and is not seen here. Nor is a
wrong product of matrices: kernels may be tuned on each rank, so that their sums need not agree to the last bit.
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
class Verdict:
    """What a comparison gave.

    Attributes:
        ranks: those whose data is wrong; empty if all agree.
        certain: False when as many ranks hold one thing as hold another: then ``ranks`` are all of these.
        what: which of their data.
    """

    ranks: tuple[int, ...] = ()
    certain: bool = True
    what: str = ""


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A sum over all bits of ``tensors``, below 2⁵², as an int64 scalar on their device.

    Any single flipped bit changes it, in values of up to four bytes. Each tensor's words are added up as integers, in
    whatever order; the sums get odd weights: an odd multiple of a power of two below 2⁵² is never 0 modulo 2⁵².
    """
    sums = [each.view(_INTEGERS[each.element_size()]).sum(dtype=torch.int64) for each in map(_local, tensors)]
    stacked = torch.stack(sums)
    weights = torch.arange(1, 2 * len(sums), 2, device=stacked.device)
    return (stacked * weights).sum() & _MASK


class Checksums:
    """One rank's part: a look after every ``every``-th update and after the start, told with the next step's reduction.

    Nothing here waits for the GPU: what is compared travels in the reduction that the step has anyway.

    Args:
        model: sharded.
        optimizer: its own, its state allocated.
        layout: for who should hold the same.
        every: updates between two looks; 0: never.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layout: Layout, every: int) -> None:
        self._model = model
        self._held = [(p, state) for p, state in optimizer.state.items() if "exp_avg" in state]
        self._every = every
        self._dp, self._tp, self._rank = layout.dp, layout.tp, layout.rank
        self._replicated = _replicated([p for p, _ in self._held])
        self._at_rest = self._own() if every else None

    def updated(self, step: int, flip: int | None) -> None:
        """Update ``step`` was applied. ``flip``: a drill wants a bit flipped on this rank, behind everybody's back."""
        if self._every and (step % self._every == 0 or flip is not None):
            self._at_rest = self._own()
            if flip == self._rank:
                flip_bit(max((_local(p) for p, _ in self._held), key=Tensor.numel))

    def told(self, position: int) -> Tensor | None:
        """What this rank brings into the reduction: a few float64. None, on all ranks alike, between two looks.

        Args:
            position: index in the data of the first sample of this step.
        """
        if self._at_rest is None:
            return None
        counters = checksum(state["step"] for _, state in self._held) + position
        parts = [self._own() != self._at_rest, counters, self._gathered()]
        parts += [self._own(indices) for indices, _ in self._replicated]
        self._at_rest = None
        return torch.stack([part.double() for part in parts])

    def judge(self, told: Sequence[Sequence[float]]) -> Verdict | None:
        """Who is wrong, from what each rank told, by rank; None if nobody told anything. The same on every rank."""
        if not told:
            return None
        changed, counters, gathered, *replicated = zip(*told, strict=True)
        if any(changed):
            ranks = tuple(rank for rank, each in enumerate(changed) if each)
            return Verdict(ranks, True, "its own shards changed between two updates")
        everybody = [list(range(self._dp * self._tp))]
        columns = [[rank * self._tp + column for rank in range(self._dp)] for column in range(self._tp)]
        comparisons = [
            (counters, everybody, "the optimizer's step counters or the place in the data are not the others'"),
            (gathered, columns, "its copy of the gathered parameters is not that of the other data-parallel ranks"),
        ]
        for values, (_, groups) in zip(replicated, self._replicated, strict=True):
            comparisons.append((values, groups, "its copy of replicated shards is not the others'"))
        for values, groups, what in comparisons:
            odd, certain = _odd(values, groups)
            if odd:
                return Verdict(odd, certain, what)
        return Verdict()

    def _own(self, indices: Iterable[int] | None = None) -> Tensor:
        """Of this rank's shards of parameters and moments: all of them, or some."""
        held = self._held if indices is None else [self._held[index] for index in indices]
        return checksum(each for p, state in held for each in (p, state["exp_avg"], state["exp_avg_sq"]))

    def _gathered(self) -> Tensor:
        """Of the parameters as they are computed with: sharded ones are gathered once more, layer by layer."""
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
    """Flip the mantissa's highest bit of the float32 in the middle of ``tensor``, in place: wrong, but no outlier."""
    words = tensor.view(torch.int32).view(-1)
    words[len(words) // 2] ^= 1 << 22


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that ``module`` gathers itself: not those of the FSDP modules inside it."""
    children = (child for child in module.modules() if child is not module and isinstance(child, FSDPModule))
    theirs = {p for child in children for p in child.parameters()}
    return [p for p in module.parameters() if p not in theirs]


def _replicated(parameters: Sequence[Tensor]) -> list[tuple[list[int], list[list[int]]]]:
    """For each dimension of the mesh: which parameters it replicates, and the ranks that so hold the same."""
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
    """The ranks that do not hold what more than half of their group holds, and whether there was such a majority."""
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
