"""Micro-batches on their way to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.step.copies import to_device

_ALIGN = 16  # numbers of 8 bytes: kernels load from addresses that are multiples of 16 bytes, or load slowly


def put(inputs: Tensor, targets: Tensor, now: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch and the values of the clock on ``device``: one copy from pinned memory, for which nobody waits.

    While a GPU computes a micro-batch, the host reads the next one and queues its copy. Each has pinned memory of its
    own until the GPU has passed its copy; torch then uses that memory again, so about two pieces go round.

    Args:
        inputs: token ids [batch, sequence], on the host.
        targets: the same shape.
        now: :meth:`trainer.model.dropout.DropoutClock.values`.
        device: on a CPU nothing is copied.
    """
    parts = (inputs, targets, torch.tensor(now, dtype=torch.int64))
    if device.type == "cpu":
        return parts
    return unpacked(to_device(packed(parts, pin=True), device), parts)


def packed(parts: Sequence[Tensor], *, pin: bool) -> Tensor:
    """All ``parts`` (int64) in one row of memory, pinned if ``pin``."""
    whole = torch.empty(sum(map(_room, parts)), dtype=torch.int64, pin_memory=pin)
    for part, piece in zip(parts, unpacked(whole, parts), strict=True):
        piece.copy_(part)
    return whole


def unpacked(whole: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The places of ``parts`` in a row that :func:`packed` made, or in its copy."""
    inputs, targets, now = (
        piece[: part.numel()].view(part.shape)
        for part, piece in zip(parts, whole.split(list(map(_room, parts))), strict=True)
    )
    return inputs, targets, now


def _room(part: Tensor) -> int:
    return -(-part.numel() // _ALIGN) * _ALIGN
