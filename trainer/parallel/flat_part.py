"""A tensor that is cut as one flat row of numbers, in a form that checkpoints can hold.

fairscale's FSDP puts the parameters of a layer end to end and cuts the row evenly. So a rank may hold a matrix from the
middle of one of its rows to the middle of another. A checkpoint holds rectangles. Any such range is at most three of
them: the rest of a row, whole rows, and the begin of a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatPart(Tensor):
    """This rank's range of a tensor. It has the shape of the whole tensor, but no operation can be applied to it.

    Checkpoints ask a tensor three things: what it writes, where its chunks are, and for the memory of a chunk. torch's
    own DTensor answers by the same three methods (torch/distributed/_checkpointable.py).

    Args:
        values: the numbers of the range, one-dimensional. Chunks share their memory.
        begin: number of the first of them in the flat row of ``local_shape``.
        local_shape: of the tensor, or of the tensor-parallel part of it that the rank takes its range from.
        shape: of the whole tensor.
        offset: place of that part in the whole tensor.
    """

    _chunks: list[tuple[torch.Size, Tensor]]

    def __new__(
        cls, values: Tensor, begin: int, local_shape: torch.Size, shape: torch.Size, offset: Sequence[int]
    ) -> Self:
        """See the class."""
        make: Any = torch.Tensor._make_wrapper_subclass  # noqa: SLF001  the documented way to build such a class
        made: Self = make(cls, shape, dtype=values.dtype, device=values.device)
        made._chunks = [
            (torch.Size(at + more for at, more in zip(place, offset, strict=True)), chunk)
            for place, chunk in rectangles(values, begin, local_shape)
        ]
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Its shape and its chunks."""
        return f"FlatPart({tuple(self.shape)}, {[(tuple(at), tuple(chunk.shape)) for at, chunk in self._chunks]})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every operation: only checkpoints read and write it, chunk by chunk."""
        raise NotImplementedError(f"{func} of a tensor of which this rank holds a flat range")

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:  # noqa: A002
        """What this rank writes: an item for each chunk."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, at),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=at, sizes=chunk.shape),
                    properties=TensorProperties.create_from_tensor(chunk),
                    size=self.shape,
                ),
            )
            for at, chunk in self._chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Where the chunks are in the whole tensor."""
        return [ChunkStorageMetadata(offsets=at, sizes=chunk.shape) for at, chunk in self._chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of the chunk that begins at ``index.offset``."""
        return next(chunk for at, chunk in self._chunks if at == index.offset)


def rectangles(values: Tensor, begin: int, shape: torch.Size) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The rectangles of a range of a tensor of one or two dimensions, each with its first place.

    Args:
        values: the range, one-dimensional.
        begin: number of its first element in the row-by-row order of ``shape``.
        shape: of the tensor.
    """
    if len(shape) == 1:
        if len(values):
            yield (begin,), values
        return
    assert len(shape) == 2, shape
    width, end = shape[1], begin + len(values)
    while begin < end:
        row, column = divmod(begin, width)
        whole_rows = 0 if column else (end - begin) // width
        count = whole_rows * width or min(width - column, end - begin)
        piece, values = values[:count], values[count:]
        yield (row, column), piece.view(-1, width) if whole_rows else piece.view(1, -1)
        begin += count
