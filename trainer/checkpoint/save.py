"""One save, made by the writers of all ranks together: to the first place, and from there to others."""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from opt_ops.contract import manifest
from opt_ops.contract.fence import Fence, SupersededError
from opt_ops.contract.manifest import CheckpointError, folders_of
from trainer.checkpoint import mirror, retention, transfer
from trainer.checkpoint.agree import on_all_ranks, on_rank_0, one_line
from trainer.checkpoint.retention import EVERYTHING, HELD, ORIGIN, Retention
from trainer.console import print_line

# Rank 0 waits this long for the slowest rank. Then the save has failed.
COMMIT_DEADLINE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where checkpoints go.

    Attributes:
        folder: for the durable checkpoints of the run, and for the manifests of its snapshots.
        node: name of this rank's node.
        disk: folder on the node for the snapshots of all runs. With None there are no snapshots.
        url: a second place for durable checkpoints; empty for none.
        fence: read by rank 0.
        snapshots: which snapshots are kept.
        durable: which durable checkpoints are kept.
    """

    folder: Path
    node: str
    disk: Path | None = None
    url: str = ""
    fence: Fence
    snapshots: Retention = EVERYTHING
    durable: Retention = EVERYTHING

    def on_disk(self, path: Path) -> Path:
        """The folder for this node's shards of the snapshot ``path``."""
        assert self.disk is not None
        return self.disk / self.folder.absolute().parent.name / path.name


@dataclass(frozen=True, slots=True)
class WriterReport:
    """What a writer reports to its rank.

    Attributes:
        what: ``saved`` answers :meth:`Writer.save`; ``copied``: a copy to another place has ended; ``pruned``: old
            checkpoints could not be removed; ``gone``: the process has ended; ``ready`` answers everything else.
        error: why it failed, in one line. None if it did not.
        superseded: whether it failed because the fence stopped it.
        seconds: how long it took.
        value: the answer to a question.
    """

    what: Literal["ready", "saved", "copied", "pruned", "gone"]
    error: str | None = None
    superseded: bool = False
    seconds: float = 0.0
    value: Any = None


class Saver:
    """Makes saves in the writer of one rank. The writers of all ranks get the same saves in the same order.

    Args:
        destination: where checkpoints go.
        planner: what this rank writes.
        trained: whether there is an element of a tensor in it. All that is saved here changes in every update.
        report: gets the results of the copies and of the pruning that follow a save.
    """

    def __init__(
        self, destination: Destination, planner: SavePlanner, trained: bool, report: Callable[[WriterReport], None]
    ) -> None:
        self._to = destination
        self._planner = planner
        self._trained = trained
        self._report = report
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._nodes: list[str] = [""] * self._world
        dist.all_gather_object(self._nodes, destination.node)
        self._first_here = self._nodes.index(destination.node) == self._rank
        self._copies: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._make_copies, daemon=True, name="copies").start()

    def save(self, header: Mapping[str, Any], durable: bool) -> WriterReport:
        """Write the staged state and commit it. Then start the copies to other places, and prune old checkpoints.

        A committed checkpoint stays, even if copies or pruning fail.

        Args:
            header: the fields of the manifest except ``files`` and ``nodes``.
            durable: whether a durable checkpoint is needed. Otherwise a snapshot is enough.
        """
        begin = time.monotonic()
        first = manifest.snapshot_folder if self._to.disk else manifest.step_folder
        path = first(self._to.folder, header["step"])
        begun = False
        try:
            begun = on_rank_0(None, self._make_room, path, header["settings_digest"])
            names = self._write(path, header) if begun else []
        except (Exception, CheckpointException) as error:  # noqa: BLE001  no failure of a save may end training
            print_line(f"checkpoint not saved: {path}: {one_line(error)}", sys.stderr)
            if begun and not self._to.fence.others_write:
                self._remove(path)  # if the disk is full, the next save needs the room
            return WriterReport("saved", one_line(error), isinstance(error, SupersededError), time.monotonic() - begin)
        try:
            if begun:
                self._begin_copies(path, header, names, durable)
                self._prune_everywhere()
        except SupersededError as error:
            return WriterReport("saved", one_line(error), True, time.monotonic() - begin)
        return WriterReport("saved", seconds=time.monotonic() - begin)

    def finish(self) -> None:
        """Wait for the copies."""
        self._copies.join()

    def _write(self, path: Path, header: Mapping[str, Any]) -> list[str]:
        """Write, commit, and return the names of this rank's files."""
        where = self._to.on_disk(path) if self._to.disk else path
        on_all_ranks(None, self._begin, path, where)
        # Without copies ahead, torch reads tensors as they are. Otherwise it asks for a CUDA stream beside a GPU.
        save({}, storage_writer=FileSystemWriter(where, per_thread_copy_ahead=0), planner=self._planner)
        shards = [file.name for file in where.glob(f"__{self._rank}_*.distcp")]
        names = [*shards, ".metadata"] if self._rank == 0 else shards
        state = shards if self._trained else []
        copies: list[str] = []
        place = None
        if self._to.disk:
            place = {"node": self._to.node, "host": socket.gethostname(), "folder": str(where)}
            transfers = transfer.to_peers(self._nodes, on_all_ranks(None, lambda: names))
            on_all_ranks(None, transfer.exchange, transfers, where)
            copies = [each.name for each in transfers if each.target == self._rank]
        on_all_ranks(
            None, lambda: manifest.write_rank(path, self._rank, names, state=state, copies=copies, place=place)
        )
        on_rank_0(None, self._commit, path, header)
        return names

    def _make_room(self, path: Path, settings_digest: str) -> bool:
        """Remove what an earlier attempt left of this step. False if that is a good checkpoint of the same training.

        A snapshot is always written again: its shards may be on nodes that this job has lost.
        """
        self._to.fence.check()
        if not self._to.disk or path.name.startswith("step-"):
            with contextlib.suppress(CheckpointError):
                if manifest.verify(path).settings_digest == settings_digest:
                    return False
        if path.exists():
            manifest.remove(path)
        path.mkdir(parents=True)
        return True

    def _begin(self, path: Path, where: Path) -> None:
        if self._to.disk and self._first_here:
            if where.exists():
                manifest.remove(where)
            where.mkdir(parents=True)
            (where / ORIGIN).write_text(f"{path.absolute()}\n", encoding="utf-8")

    def _commit(self, path: Path, header: Mapping[str, Any]) -> None:
        manifest.commit(
            path,
            ranks=self._world,
            deadline_seconds=COMMIT_DEADLINE_SECONDS,
            header=header,
            before_marker=self._to.fence.check,
        )

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if self._rank == 0:
                manifest.remove(path)
        with contextlib.suppress(OSError):
            if self._to.disk and self._first_here:
                manifest.remove(self._to.on_disk(path))

    def _begin_copies(self, path: Path, header: Mapping[str, Any], names: list[str], durable: bool) -> None:
        """Queue the copies. A copy that cannot start is reported in its turn, like one that fails.

        Raises:
            SupersededError: the fence stops the copy.
        """
        try:
            if durable and self._to.disk:
                self._copy_to_folder(header, names)
            elif durable and self._to.url:
                self._copies.put(lambda: self._mirror(path))
        except SupersededError:
            raise
        except Exception as error:  # noqa: BLE001  the save is committed; a copy that fails must not end training
            self._copies.put(partial(_raise, error))

    def _prune_everywhere(self) -> None:
        try:
            on_all_ranks(None, self._prune)
        except Exception as error:  # noqa: BLE001  as above
            print_line(f"old checkpoints not removed: {one_line(error)}", sys.stderr)
            self._report(WriterReport("pruned", one_line(error)))

    def _prune(self) -> None:
        if self._rank == 0:
            retention.thin(self._to.folder, "step", self._to.durable)
            retention.thin(self._to.folder, "snapshot", self._to.snapshots)
        if self._to.disk and self._first_here:
            retention.sweep(self._to.disk, self._to.folder.absolute(), self._to.snapshots)

    def _copy_to_folder(self, header: Mapping[str, Any], names: list[str]) -> None:
        """Queue the copy of the snapshot that was just written to the folder for durable checkpoints.

        First its files get a second name on this disk (hard links), because the snapshot may be pruned before that.
        """
        step = header["step"]
        path = manifest.step_folder(self._to.folder, step)
        if not on_rank_0(None, self._make_room, path, header["settings_digest"]):
            return
        snapshot = manifest.snapshot_folder(self._to.folder, step)
        expected = manifest.written_by(snapshot, self._rank)
        held = self._to.on_disk(snapshot).with_name(f"{HELD}{step:08d}")
        on_all_ranks(None, self._hold, names, self._to.on_disk(snapshot), held)
        self._copies.put(lambda: self._to_folder(path, held, header, expected))

    def _hold(self, names: list[str], snapshot: Path, held: Path) -> None:
        held.mkdir(exist_ok=True)
        for name in names:
            (held / name).parent.mkdir(parents=True, exist_ok=True)
            (held / name).unlink(missing_ok=True)
            os.link(snapshot / name, held / name)

    def _to_folder(self, path: Path, held: Path, header: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        mirror.copy_durably(held, path, expected)
        for name in expected:
            (held / name).unlink()
        with contextlib.suppress(OSError):  # only the last rank on this node finds the folders empty
            for folder in sorted({held, *(each for name in expected for each in folders_of(held, name))}, reverse=True):
                folder.rmdir()
        manifest.write_rank(path, self._rank, expected, expected=expected)
        if self._rank == 0:
            self._commit(path, header)
        if self._to.url:
            self._mirror(path)

    def _mirror(self, path: Path) -> None:
        mirror.send(path, self._to.url, self._rank, self._world, COMMIT_DEADLINE_SECONDS)

    def _make_copies(self) -> None:
        while True:
            work = self._copies.get()
            try:
                work()
                self._report(WriterReport("copied"))
            except Exception as error:  # noqa: BLE001  a copy that fails is reported; it must not end this thread
                print_line(f"checkpoint not copied: {one_line(error)}", sys.stderr)
                self._report(WriterReport("copied", one_line(error)))
            finally:
                self._copies.task_done()


def _raise(error: Exception) -> None:
    raise error
