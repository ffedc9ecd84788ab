"""Copies between the host and a GPU that do not make the host wait. On a CPU nothing is copied."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values``, which are on the host, on ``device``.

    A copy from memory that is not pinned waits until the GPU has done everything before it. torch does not use a piece
    of pinned memory again until the GPU has passed the copies from it, so the piece may be dropped at once.
    """
    if device.type == "cpu":
        return values
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy ``values`` to the host.

    Returns:
        A function that waits for the values and returns them. It does not wait for what is queued after this call.
    """
    if values.device.type == "cpu":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return read
