"""What fairscale's FSDP needs of CUDA, as nothing: its streams, and the notes that memory is used on one of them.

fairscale's module sees this in place of ``torch``. All else in it is real: hooks, flat parameters, and collectives, on
gloo. What only a GPU can show stays unseen: whether streams wait for each other where they must.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


class _Stream:
    """Everything happens at once, in order."""

    def wait_stream(self, other: "_Stream") -> None: ...

    def synchronize(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = None  # type: ignore[assignment]


class _Cuda(ModuleType):
    Stream = _Stream

    def is_available(self) -> bool:
        return True

    def current_stream(self) -> _Stream:
        return _Stream()

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        assert isinstance(stream, _Stream)
        yield

    def synchronize(self) -> None: ...


class _Torch(ModuleType):
    cuda = _Cuda("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_REDUCE_SCATTER: Any = vars(dist)["_reduce_scatter_base"]


def _reduce_scatter(output: Tensor, input_: Tensor, group: dist.ProcessGroup) -> None:
    """As it is, but flat: gloo compares the shapes, NCCL only the sizes."""
    _REDUCE_SCATTER(output, input_.flatten(), group=group)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """While this lasts, fairscale's FSDP takes the CPU for a GPU."""
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as module

    with (
        mock.patch.object(module, "torch", _Torch("torch")),
        mock.patch.object(Tensor, "record_stream"),
        mock.patch.object(dist, "_reduce_scatter_base", _reduce_scatter),
    ):
        yield
