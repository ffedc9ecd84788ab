"""Run work on one rank or on all, so that an error on one rank is raised on all. Otherwise some would wait forever."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opt_ops.contract.fence import OutdatedError, SupersededError
from opt_ops.contract.manifest import CheckpointError

_Result = TypeVar("_Result")
_EXPECTED = (OSError, CheckpointError, OutdatedError, SupersededError)


def on_rank_0(group: dist.ProcessGroup | None, work: Callable[..., _Result], *args: Any) -> _Result:
    """Run ``work(*args)`` on rank 0. All ranks return its result.

    Raises:
        Exception: on all ranks, the error of rank 0. An error of a class that is not expected becomes a RuntimeError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work(*args)
        except Exception as error:  # noqa: BLE001  all ranks must get any error
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all_ranks(group: dist.ProcessGroup | None, work: Callable[..., _Result], *args: Any) -> list[_Result]:
    """Run ``work(*args)`` on every rank. All ranks return the results of all, by rank.

    Raises:
        Exception: on all ranks, the error of the lowest rank that failed, as in :func:`on_rank_0`.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    mine: tuple[Any, Exception | None]
    try:
        mine = work(*args), None
    except Exception as error:  # noqa: BLE001  as above
        mine = None, _portable(error)
    dist.all_gather_object(outcomes, mine, group=group)
    for rank, (_, error) in enumerate(outcomes):
        if isinstance(error, OSError):
            raise OSError(f"rank {rank}: {error}")
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _portable(error: Exception) -> Exception:
    """An error that can be sent to other ranks. One of an unexpected class may not survive pickling."""
    if isinstance(error, _EXPECTED):
        return error
    traceback.print_exception(error)
    return RuntimeError(f"{type(error).__name__}: {error}")


def one_line(error: BaseException) -> str:
    """The text of an error, in one line of at most 300 characters."""
    if isinstance(error, CheckpointException):  # its own text is a page of tracebacks
        causes = [f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items())]
    else:
        causes = [str(error) or repr(error)]
    return " ".join("; ".join(causes).split())[:300]
