"""The writer: a process beside each rank that writes the staged state while training continues.

The writers of all ranks form a group. A newer generation of the ranks needs another group, and a process that waits in
a collective cannot leave it. So each generation has writers of its own. They are forked by a process that does nothing
else: the rank has threads, connections and perhaps a GPU by then.
"""

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

import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented, not in __all__
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from trainer import device
from trainer.checkpoint.save import Destination, Saver, WriterReport
from trainer.checkpoint.staging import Staging, holds_elements, views
from trainer.parallel.mesh import TIMEOUT

_PR_SET_PDEATHSIG = 1
_ALL_INTERFACES = "0.0.0.0"  # noqa: S104  as in torch's own store: the other ranks are on other hosts


class Writer:
    """A rank's handle on its writer. The writer makes one save at a time.

    The process is forked, which takes less time and memory than a second start. The fork must come before this process
    opens connections or a GPU. Otherwise the writer would hold copies of them, and peers would not notice the death of
    this process. The writer ends with this process.

    Attributes:
        pid: process id of the writer.
    """

    def __init__(self) -> None:
        assert not dist.is_initialized(), "the writer is started before the process group"
        self._control, theirs = Pipe()
        self._lock = threading.Lock()  # another thread may end the writer
        parent = os.getpid()
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._starter = os.fork()
        if self._starter == 0:
            self._control.close()
            _run(theirs, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        self.pid = 0
        self.renew()

    def renew(self) -> None:
        """End the writer, and start another one, which belongs to no group yet. A save in flight is given up.

        Raises:
            RuntimeError: the process that starts writers has ended.
        """
        with self._lock:
            self._pipe, theirs = Pipe()
            try:
                self._control.send(True)
                send_handle(self._control, theirs.fileno(), self._starter)
                self.pid = self._control.recv()
            except (EOFError, OSError):
                raise RuntimeError(f"the process that starts checkpoint writers ({self._starter}) has ended") from None
            finally:
                theirs.close()

    def end(self) -> None:
        """End the writer: whoever waits for its report learns that it is gone. Any thread may call this."""
        with self._lock, contextlib.suppress(EOFError, OSError):  # the starter is gone, and the writer with it
            self._control.send(False)
            self._control.recv()

    def join(self, staging: Staging, destination: Destination, address: str, group: dist.ProcessGroup | None) -> None:
        """Let the writers of all ranks form a group, on a port that rank 0's writer chooses.

        Args:
            staging: the shared memory.
            destination: where checkpoints go.
            address: the host of rank 0.
            group: of the ranks.

        Raises:
            RuntimeError: the writer has ended.
        """
        port: list[Any] = [None]
        rank = dist.get_rank()
        if rank == 0:
            destination.fence.refresh()
            self._pipe.send(dist.get_world_size())
            port = [self._answer().value]
        dist.broadcast_object_list(port, src=0, group=group)
        self._pipe.send((rank, dist.get_world_size(), address, port[0]))
        self._pipe.send((staging.plan, staging.metadata, staging.size, destination))
        send_handle(self._pipe, staging.memory, self.pid)
        self._answer()

    def save(self, header: Mapping[str, Any], durable: bool) -> None:
        """Let the writer write the staged state."""
        self._send((dict(header), durable))

    def finish(self) -> None:
        """Request a report when all copies to other places have ended."""
        self._send(None)

    def _send(self, what: tuple[dict[str, Any], bool] | None) -> None:
        with contextlib.suppress(OSError):  # the writer is gone; receive() reports that
            self._pipe.send(what)

    def receive(self, wait: bool) -> WriterReport | None:
        """The next report of the writer. Without ``wait``, None if there is none yet."""
        try:
            return self._pipe.recv() if wait or self._pipe.poll() else None
        except (EOFError, OSError):
            reason = f"the process that writes checkpoints ({self.pid}) has ended; only a restart starts another one"
            return WriterReport("gone", reason)

    def _answer(self) -> WriterReport:
        report = self.receive(wait=True)
        assert report is not None
        if report.error:
            raise RuntimeError(report.error)
        return report


def _run(control: Connection, parent: int) -> NoReturn:
    """Everything that the forked process does, to its end."""
    try:
        _detach_from_parent(parent)
        _serve(_start_writers(control))
    except (EOFError, OSError):
        os._exit(0)  # the rank has ended
    except BaseException as error:  # noqa: BLE001  a forked process must never return into the code of its parent
        print(f"the process that writes checkpoints has failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def _detach_from_parent(parent: int) -> None:
    """Leave signals and GPUs to the rank, and end when the rank ends."""
    device.hide_gpus()
    gc.freeze()  # objects of the rank may wait, when they are destroyed, for threads that this process does not have
    _end_with(parent)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process of a job
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    device.use_one_cpu_thread()


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _start_writers(control: Connection) -> Connection:
    """Start a writer whenever the rank asks for one, and end the one before. Returns only in a writer: its pipe."""
    starter, writer = os.getpid(), 0
    while True:
        wanted = control.recv()
        if writer:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)  # nobody else reaps it, so the number is still its own
            writer = 0
        if wanted:
            pipe = Connection(recv_handle(control))
            writer = os.fork()
            if writer == 0:
                control.close()
                _end_with(starter)
                return pipe
            pipe.close()
        control.send(writer)


def _serve(pipe: Connection) -> NoReturn:
    first = pipe.recv()
    store = None
    if isinstance(first, int):
        store = TCPStore(_ALL_INTERFACES, 0, first, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        pipe.send(WriterReport("ready", value=store.port))
        first = pipe.recv()
    rank, world, address, port = first
    store = store or TCPStore(address, port, world, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    plan, metadata, size, destination = pipe.recv()
    memory = mmap.mmap(recv_handle(pipe), size)
    lock = threading.Lock()  # another thread reports on copies

    def send(report: WriterReport) -> None:
        with lock:
            pipe.send(report)

    planner = PreparedPlanner(plan, metadata, list(views(memory, plan)))
    saver = Saver(destination, planner, holds_elements(plan), send)
    send(WriterReport("ready"))
    while True:
        request = pipe.recv()
        if request is None:
            saver.finish()
            send(WriterReport("ready"))
            continue
        send(saver.save(*request))


class PreparedPlanner(DefaultSavePlanner):
    """A planner whose plan exists already, with the memory that holds the tensors."""

    def __init__(self, plan: SavePlan, metadata: Metadata | None, tensors: list[Tensor]) -> None:
        super().__init__()
        self._plan, self._metadata = plan, metadata
        self._tensors = {item.index: tensor for item, tensor in zip(plan.items, tensors, strict=True)}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the plan exists already."""

    def create_local_plan(self) -> SavePlan:
        """An empty plan: rank 0 knows the plans of all ranks."""
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are, and the metadata, to which the storage layer adds."""
        assert self._metadata is not None
        return all_plans, self._metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The prepared plan, with the data that the storage layer has added."""
        return dataclasses.replace(self._plan, storage_data=new_plan.storage_data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The staged tensor."""
        return self._tensors[write_item.index]

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The staged tensor."""
        return self._tensors[index]
