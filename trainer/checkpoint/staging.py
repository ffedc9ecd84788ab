"""Host memory for a copy of the training state. The rank and its writer share it."""

import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

_ALIGNED = 64  # bytes of a cache line


class Staging:
    """Shared memory for this rank's part of ``state``. Every save copies the part into it.

    The layout alone decides which rank writes what. So the ranks agree on it once. Of several ranks that hold the same
    part, one copies and writes it. The memory has no name, so nothing of it is left when the processes end. With a GPU
    it is pinned.

    Attributes:
        plan: what this rank writes.
        metadata: what all ranks write, on rank 0; None on other ranks.
        memory: file descriptor of the memory.
        size: of the memory, in bytes.
    """

    def __init__(self, state: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self._planner = DefaultSavePlanner()
        self._planner.set_up_planner(dict(state), is_coordinator=rank == 0)
        local: list[Any] = [None] * world
        dist.gather_object(self._planner.create_local_plan(), local if rank == 0 else None, group=group)
        agreed: list[Any] = [None] * world
        self.metadata: Metadata | None = None
        if rank == 0:
            agreed, self.metadata = self._planner.create_global_plan(local)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, agreed if rank == 0 else None, group=group)
        self.plan: SavePlan = self._planner.finish_plan(mine[0])
        self.size = max(1, sum(_padded(item) for item in self.plan.items))
        self.memory = os.memfd_create("checkpoint")
        os.ftruncate(self.memory, self.size)
        self._map = mmap.mmap(self.memory, self.size)
        self._views = list(views(self._map, self.plan))
        if torch.cuda.is_available():
            runtime: Any = torch.cuda.cudart()
            pointer = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(runtime.cudaHostRegister(pointer, self.size, 0))

    def copy(self) -> None:
        """Copy the present state, and return when the copy is complete."""
        for item, view in zip(self.plan.items, self._views, strict=True):
            live = self._planner.resolve_data(item)
            assert isinstance(live, Tensor)
            view.copy_(live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def views(memory: mmap.mmap, plan: SavePlan) -> Iterator[Tensor]:
    """The tensors in ``memory`` for the items of ``plan``, in their order."""
    buffer, begin = torch.frombuffer(memory, dtype=torch.uint8), 0
    for item in plan.items:
        yield buffer[begin : begin + _bytes(item)].view(_tensor(item).properties.dtype).view(_tensor(item).chunk.sizes)
        begin += _padded(item)


def _tensor(item: WriteItem) -> Any:
    assert item.tensor_data is not None  # the state holds tensors only
    return item.tensor_data


def _bytes(item: WriteItem) -> int:
    return _tensor(item).chunk.sizes.numel() * _tensor(item).properties.dtype.itemsize


def _padded(item: WriteItem) -> int:
    return -(-_bytes(item) // _ALIGNED) * _ALIGNED
