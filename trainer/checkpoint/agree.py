"""What goes wrong on one rank goes wrong on all: else some of them wait for ever."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opt_ops.contract.manifest import CheckpointError
from trainer.errors import SupersededError

_Result = TypeVar("_Result")
_EXPECTED = (OSError, CheckpointError, SupersededError)


def on_rank_0(group: dist.ProcessGroup | None, work: Callable[..., _Result], *args: Any) -> _Result:
    """What ``work(*args)`` returns or raises on rank 0, on all ranks."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work(*args)
        except Exception as error:  # noqa: BLE001  whatever it is, all hear of it
            outcome[1] = _told(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all_ranks(group: dist.ProcessGroup | None, work: Callable[..., _Result], *args: Any) -> list[_Result]:
    """What ``work(*args)`` returns on each rank. If it fails on one, it fails on all, at once."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    mine: tuple[Any, Exception | None]
    try:
        mine = work(*args), None
    except Exception as error:  # noqa: BLE001  as above
        mine = None, _told(error)
    dist.all_gather_object(outcomes, mine, group=group)
    for rank, (_, error) in enumerate(outcomes):
        if isinstance(error, OSError):
            raise OSError(f"rank {rank}: {error}")
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _told(error: Exception) -> Exception:
    """What other ranks can be told of it: an error that nobody foresaw may not even travel."""
    if isinstance(error, _EXPECTED):
        return error
    traceback.print_exception(error)
    return RuntimeError(f"{type(error).__name__}: {error}")


def one_line(error: BaseException) -> str:
    """What went wrong, in at most 300 characters."""
    if isinstance(error, CheckpointException):  # whose own text is a page of tracebacks
        causes = [f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items())]
    else:
        causes = [str(error) or repr(error)]
    return " ".join("; ".join(causes).split())[:300]
