"""The process beside each rank that writes what the rank has staged, while training goes on."""

import contextlib
import ctypes
import dataclasses
import gc
import mmap
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented, not in __all__
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from trainer.checkpoint.save import Destination, Saver, Told
from trainer.checkpoint.staging import Staging, views
from trainer.parallel.mesh import TIMEOUT

_PR_SET_PDEATHSIG = 1
_ALL_INTERFACES = "0.0.0.0"  # noqa: S104  as torch's own store does: the other ranks are on other hosts


class Writer:
    """A rank's handle on its writer. One save at a time.

    The process is forked, so that it costs neither the time nor the memory of a second start. That must be before this
    process has opened connections or a GPU: a copy of them in another process would hide the death of this one from
    its peers. It dies with this process.

    Attributes:
        pid: of the process.
    """

    def __init__(self) -> None:
        assert not dist.is_initialized(), "the writer is started before the process group"
        self._pipe, theirs = Pipe()
        parent = os.getpid()
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            self._pipe.close()
            _live(theirs, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()

    def join(self, staging: Staging, destination: Destination, address: str, group: dist.ProcessGroup) -> None:
        """Let the writers of all ranks meet, on a port that rank 0's chooses.

        Args:
            staging: the memory that is written from.
            destination: where to.
            address: of rank 0's host.
            group: of the ranks.
        """
        port: list[Any] = [None]
        rank = dist.get_rank()
        if rank == 0:
            destination.fence.look()
            self._pipe.send(dist.get_world_size())
            port = [self._answer().value]
        dist.broadcast_object_list(port, src=0, group=group)
        self._pipe.send((rank, dist.get_world_size(), address, port[0]))
        self._pipe.send((staging.plan, staging.metadata, staging.size, destination))
        send_handle(self._pipe, staging.memory, self.pid)
        self._answer()

    def save(self, header: Mapping[str, Any], durable: bool) -> None:
        """Begin to write what is staged now."""
        self._ask((dict(header), durable))

    def finish(self) -> None:
        """Ask for an answer once all copies to other places have ended."""
        self._ask(None)

    def _ask(self, what: tuple[dict[str, Any], bool] | None) -> None:
        with contextlib.suppress(OSError):  # the process is gone, which hear() tells
            self._pipe.send(what)

    def hear(self, wait: bool) -> Told | None:
        """What the writer has to tell, if there is something, or when there is."""
        try:
            return self._pipe.recv() if wait or self._pipe.poll() else None
        except (EOFError, OSError):
            return Told("gone", f"the process {self.pid} that writes checkpoints has ended; restart to get another")

    def _answer(self) -> Told:
        told = self.hear(wait=True)
        assert told is not None
        if told.error:
            raise RuntimeError(told.error)
        return told


def _live(pipe: Connection, parent: int) -> NoReturn:
    """The whole life of the process, from the fork to its end."""
    try:
        _forget_parent(parent)
        _serve(pipe)
    except (EOFError, OSError):
        os._exit(0)  # the rank has ended
    except BaseException as error:  # noqa: BLE001  a fork must not return into its parent's code, whatever happens
        print(f"the process that writes checkpoints has failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def _forget_parent(parent: int) -> None:
    """Signals are the rank's to handle; this process ends when the rank does."""
    gc.freeze()  # what the rank has left to collect may wait, as it is destroyed, for threads that are not here
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process of a job
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork


def _serve(pipe: Connection) -> NoReturn:
    first = pipe.recv()
    store = None
    if isinstance(first, int):
        store = TCPStore(_ALL_INTERFACES, 0, first, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        pipe.send(Told("ready", value=store.port))
        first = pipe.recv()
    rank, world, address, port = first
    store = store or TCPStore(address, port, world, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    plan, metadata, size, destination = pipe.recv()
    memory = mmap.mmap(recv_handle(pipe), size)
    lock = threading.Lock()  # copies end in another thread

    def tell(told: Told) -> None:
        with lock:
            pipe.send(told)

    planner = Prepared(plan, metadata, list(views(memory, plan)))
    saver = Saver(destination, planner, tell)
    tell(Told("ready"))
    while True:
        asked = pipe.recv()
        if asked is None:
            saver.finish()
            tell(Told("ready"))
            continue
        tell(saver.save(*asked))


class Prepared(DefaultSavePlanner):
    """A plan that was made before, and the memory that its tensors are in."""

    def __init__(self, plan: SavePlan, metadata: Metadata | None, tensors: list[Tensor]) -> None:
        super().__init__()
        self._plan, self._metadata = plan, metadata
        self._tensors = {item.index: tensor for item, tensor in zip(plan.items, tensors, strict=True)}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """There is no state to look at."""

    def create_local_plan(self) -> SavePlan:
        """Nothing: rank 0 knows all."""
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Nothing but the metadata, which the storage layer adds to."""
        assert self._metadata is not None
        return all_plans, self._metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan, with what the storage layer has to say of it."""
        return dataclasses.replace(self._plan, storage_data=new_plan.storage_data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The staged tensor."""
        return self._tensors[write_item.index]

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The staged tensor."""
        return self._tensors[index]
