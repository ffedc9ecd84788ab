"""Versions of a rank's state in host memory: how they are stored, checked, sent and received."""

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Key = tuple[int, int]
"""The generation in which a version was made, and its step. A later generation makes the same steps anew."""

_ALIGNED = 64  # bytes of a cache line
_ROW = 8192  # bytes whose words are added up to one word of the checksum
_CHUNK = 64 << 20  # bytes of one message


class RefusedCopyError(Exception):
    """A copy comes from a rank of another generation, or it is not the version that was expected."""


@dataclass(frozen=True, slots=True)
class Version:
    """What identifies the copy of a state after ``step``.

    Attributes:
        step: the state is that after this update.
        generation: of the ranks that made it.
        checksum: over the state and ``text``.
        text: the header, as JSON.
    """

    step: int
    generation: int
    checksum: int
    text: bytes

    @property
    def header(self) -> dict[str, Any]:
        """What the training loop gave with the state."""
        return json.loads(self.text)

    @property
    def key(self) -> Key:
        """Which version it is."""
        return self.generation, self.step


class Slot:
    """Memory for one version.

    Attributes:
        buffer: the state, as bytes.
        version: what the memory holds; None while it holds nothing whole.
    """

    def __init__(self) -> None:
        self.buffer = torch.zeros(0, dtype=torch.uint8)
        self.version: Version | None = None

    def holds(self, step: int, generation: int, text: bytes) -> Version:
        """Note that the memory now holds a whole version. Returns it, with its checksum."""
        self.version = Version(step, generation, checksum(self.buffer, text), text)
        return self.version

    def whole(self) -> Version | None:
        """The version, if its bytes still give its checksum."""
        version = self.version
        return version if version and checksum(self.buffer, version.text) == version.checksum else None


class Slots:
    """The memory for the versions of one rank.

    Args:
        count: how many versions are held.
        size: bytes of each. None for those of another rank, which tells it with its first version.
        pinned: whether a GPU copies into the memory.
    """

    def __init__(self, count: int, size: int | None = None, *, pinned: bool = False) -> None:
        self._slots = [Slot() for _ in range(count)]
        self.size: int | None = None
        if size is not None:
            self.allocate(size, pinned=pinned)

    def __iter__(self) -> Iterator[Slot]:
        """All slots, empty ones included."""
        return iter(self._slots)

    def allocate(self, size: int, *, pinned: bool = False) -> None:
        """Allocate the memory, all of it at once. It is written, so that no page of it is missing later."""
        self.size = size
        for slot in self._slots:
            slot.buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)

    def free(self, safe: Key | None = None) -> Slot:
        """A slot to write into: an empty one, or the oldest that is not ``safe``. It then holds nothing.

        Args:
            safe: the version that must stay, if there is more than one slot.
        """
        candidates = [slot for slot in self._slots if slot.version is None or slot.version.key != safe] or self._slots
        slot = min(candidates, key=lambda each: each.version.key if each.version else (-1, -1))
        slot.version = None
        return slot

    def find(self, key: Key) -> Slot | None:
        """The slot that holds the version ``key``."""
        return next((slot for slot in self._slots if slot.version and slot.version.key == key), None)

    def whole(self) -> list[Version]:
        """The versions whose bytes still give their checksums, oldest first."""
        return sorted((found for slot in self._slots if (found := slot.whole())), key=lambda version: version.key)

    def untouched(self) -> bool:
        """Whether no version is held, not even a damaged one."""
        return all(slot.version is None for slot in self._slots)


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of a version that holds ``tensors``: each begins at a cache line, and the end is that of a row."""
    return max(1, -(-sum(map(_room, tensors)) // _ROW)) * _ROW


def views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of ``buffer`` that hold ``tensors``, with their shapes and types."""
    parts, begin = [], 0
    for tensor in tensors:
        parts.append(buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        begin += _room(tensor)
    return parts


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def checksum(buffer: Tensor, text: bytes) -> int:
    """A checksum over a version: a 64-bit integer.

    The words of each row are added up, and the rows get odd weights. So any single wrong bit, row or missing part
    changes it. It reads memory once and is ten times faster than CRC-32, because it runs in parallel words.
    """
    rows = buffer.view(torch.int64).view(-1, _ROW // 8).sum(1)
    weights = torch.arange(1, 2 * len(rows), 2)
    return int((rows * weights).sum() + zlib.crc32(text))


class Sending:
    """A version on its way to another rank.

    Args:
        slot: holds the version, and must not change until :meth:`wait` has returned.
        target: the rank that receives it.
        group: of all ranks.
        generation: of this rank.
    """

    def __init__(self, slot: Slot, target: int, group: dist.ProcessGroup, generation: int) -> None:
        version = slot.version
        assert version is not None
        head = [generation, *version.key, version.checksum, slot.buffer.numel(), len(version.text)]
        self._parts = [torch.tensor(head), *slot.buffer.split(_CHUNK), _bytes(version.text)]
        self._works = [dist.isend(part, group=group, group_dst=target, tag=tag) for tag, part in enumerate(self._parts)]

    def wait(self) -> None:
        """Wait until the other rank has it."""
        for work in self._works:
            assert work is not None
            work.wait()


@dataclass(frozen=True, slots=True)
class Received:
    """How a version arrived: with the right checksum or not, and the seconds from its begin to its end."""

    good: bool
    seconds: float


def receive(
    slots: Slots, source: int, group: dist.ProcessGroup, generation: int, expected: Key, safe: Key | None = None
) -> Received:
    """Receive a version from another rank. It is held only if its checksum is right.

    Args:
        slots: where to put it.
        source: the rank that sends it.
        group: of all ranks.
        generation: of this rank. The sender must have the same.
        expected: which version it must be.
        safe: the version that must stay.

    Raises:
        RefusedCopyError: the sender is of another generation, or sends another version or size. Nothing was
            overwritten.
        RuntimeError: the connection is lost.
    """
    head = torch.zeros(6, dtype=torch.int64)
    dist.recv(head, group=group, group_src=source, tag=0)
    begin = time.monotonic()
    theirs, made, step, total, size, length = head.tolist()
    if theirs != generation or (made, step) != expected:
        raise RefusedCopyError(
            f"rank {source} of generation {theirs} sends its state of step {step}, made in generation {made}. "
            f"Expected was step {expected[1]}, made in generation {expected[0]}, from a rank of generation {generation}"
        )
    if slots.size is None:
        slots.allocate(size)
    if size != slots.size:
        raise RefusedCopyError(f"rank {source} sends a state of {size} bytes. Expected were {slots.size} bytes")
    slot, text = slots.free(safe), torch.zeros(length, dtype=torch.uint8)
    parts = [*slot.buffer.split(_CHUNK), text]
    works = [dist.irecv(part, group=group, group_src=source, tag=tag) for tag, part in enumerate(parts, start=1)]
    for work in works:
        assert work is not None
        work.wait()
    version = Version(step, made, total, text.numpy().tobytes())
    good = checksum(slot.buffer, version.text) == total
    slot.version = version if good else None
    return Received(good, time.monotonic() - begin)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
