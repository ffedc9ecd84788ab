"""What several ranks do together: sums, and steps that fail on all ranks if they fail on one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from opt_ops.contract import CheckpointError, SupersededError, UserError

_Result = TypeVar("_Result")


def sum_over_ranks(numbers: Sequence[float], world: int) -> list[float]:
    """The sums over all ranks, in double precision. Every rank calls it."""
    if world == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def all_do(act: Callable[[], _Result], world: int, path: Path | None = None) -> _Result:
    """Act, and wait until all ranks have done it. If it fails on one rank, it fails on all: nobody waits for it.

    Args:
        act: what this rank does. It must not wait for other ranks in a way that the failure of one would block.
        world: number of ranks.
        path: the checkpoint that the act is about, for the messages.

    Raises:
        Exception: what ``act`` has raised on this rank. On the other ranks an error with the same exit code.
    """
    error: Exception | None = None
    result = None
    try:
        result = act()
    except Exception as caught:  # noqa: BLE001  it is raised again below, when all ranks know of it
        error = caught
    kinds = [SupersededError, CheckpointError, UserError, OSError]
    failures = [float(isinstance(error, kind)) for kind in kinds]
    sums = sum_over_ranks([*failures, float(error is not None)], world)
    if error:
        raise error
    if sums[0]:
        raise SupersededError("superseded: a newer attempt exists; nothing was saved")
    elsewhere = "another rank refuses it. Its log has the reason"
    if sums[1]:
        raise CheckpointError(path or Path(), elsewhere)
    if sums[2]:
        raise UserError(f"{path}: {elsewhere}." if path else f"{elsewhere}.")
    if sums[3]:
        raise OSError("another rank could not do its part. Its log has the reason.")
    if sums[4]:
        raise RuntimeError("another rank has failed. Its log has the reason.")
    return result  # pyright: ignore[reportReturnType]
