"""Host memory for a copy of the training state. The rank and its writer share it."""

import contextlib
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from trainer.console import print_line

_ALIGNED = 64  # bytes of a cache line


class Staging:
    """Shared memory for this rank's part of ``state``. Every save copies the part into it.

    The layout alone decides which rank writes what. So the ranks agree on it once. Of several ranks that hold the same
    part, one copies and writes it. The memory has no name, so nothing of it is left when the processes end. With a GPU
    it is pinned: all of it is there from the start, 12 bytes per parameter of the shard (weights and both moments).

    Attributes:
        plan: what this rank writes.
        metadata: what all ranks write, on rank 0; None on other ranks.
        memory: file descriptor of the memory.
        size: of the memory, in bytes.
    """

    def __init__(self, state: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
        self._state = dict(state)
        self.agree(group)
        self.size = max(1, sum(_padded(item) for item in self.plan.items))
        self.memory = os.memfd_create("checkpoint")
        os.ftruncate(self.memory, self.size)
        self._map = mmap.mmap(self.memory, self.size)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults, where the host allows it for shared memory
        self._views = list(views(self._map, self.plan))
        if torch.cuda.is_available():
            _pin(self._map)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Agree on who writes what, on all ranks of ``group`` together. New ranks in old places change no plan."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self._planner = DefaultSavePlanner()
        self._planner.set_up_planner(self._state, is_coordinator=rank == 0)
        local: list[Any] = [None] * world
        dist.gather_object(self._planner.create_local_plan(), local if rank == 0 else None, group=group)
        agreed: list[Any] = [None] * world
        self.metadata: Metadata | None = None
        if rank == 0:
            agreed, self.metadata = self._planner.create_global_plan(local)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, agreed if rank == 0 else None, group=group)
        self.plan: SavePlan = self._planner.finish_plan(mine[0])

    def copy(self) -> None:
        """Copy the present state, and return when the copy is complete."""
        for item, view in zip(self.plan.items, self._views, strict=True):
            live = self._planner.resolve_data(item)
            assert isinstance(live, Tensor)
            view.copy_(live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _pin(memory: mmap.mmap) -> None:
    """Pin ``memory``, so that a GPU can copy into it while the host continues. If that fails, note it and go on."""
    runtime: Any = torch.cuda.cudart()
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    try:
        torch.cuda.check_error(runtime.cudaHostRegister(address, len(memory), 0))
    except RuntimeError as error:
        print_line(
            f"note: {len(memory) / 1e9:.1f} GB of host memory for checkpoints cannot be pinned: {error}. Saves hold "
            "training up for longer. Free memory of the host, or raise the limit of locked memory (ulimit -l).",
            sys.stderr,
        )
        # CUDA keeps the error and would raise it after the next kernel, in training. A kernel here takes it away.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")


def views(memory: mmap.mmap, plan: SavePlan) -> Iterator[Tensor]:
    """The tensors in ``memory`` for the items of ``plan``, in their order."""
    buffer, begin = torch.frombuffer(memory, dtype=torch.uint8), 0
    for item in plan.items:
        yield buffer[begin : begin + _bytes(item)].view(_tensor(item).properties.dtype).view(_tensor(item).chunk.sizes)
        begin += _padded(item)


def holds_elements(plan: SavePlan) -> bool:
    """Whether a rank with this plan writes anything. It does not if it holds only empty parts of tensors."""
    return any(_bytes(item) > 0 for item in plan.items)


def _tensor(item: WriteItem) -> Any:
    assert item.tensor_data is not None  # the state holds tensors only
    return item.tensor_data


def _bytes(item: WriteItem) -> int:
    return _tensor(item).chunk.sizes.numel() * _tensor(item).properties.dtype.itemsize


def _padded(item: WriteItem) -> int:
    return -(-_bytes(item) // _ALIGNED) * _ALIGNED
