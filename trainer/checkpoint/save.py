"""One save, as the writers of all ranks do it together: to the first place, and from there on to others."""

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
from opt_ops.contract.fence import Fence
from opt_ops.contract.manifest import CheckpointError
from trainer.checkpoint import mirror, retention, transfer
from trainer.checkpoint.agree import on_all_ranks, on_rank_0, one_line
from trainer.checkpoint.retention import EVERYTHING, HELD, ORIGIN, Retention
from trainer.console import say
from trainer.errors import SupersededError

# How long rank 0 waits for the slowest rank's part before it gives a checkpoint up.
COMMIT_DEADLINE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where checkpoints go.

    Attributes:
        folder: of the run's durable checkpoints, and of its snapshots' manifests.
        node: this rank's.
        disk: on the node, for snapshots of all runs. None: there are no snapshots.
        url: a second place for durable ones; empty: none.
        fence: for rank 0.
        snapshots: which are kept.
        durable: which are kept.
    """

    folder: Path
    node: str
    disk: Path | None = None
    url: str = ""
    fence: Fence
    snapshots: Retention = EVERYTHING
    durable: Retention = EVERYTHING

    def on_disk(self, path: Path) -> Path:
        """Where this node has its shards of the snapshot ``path``."""
        assert self.disk is not None
        return self.disk / self.folder.absolute().parent.name / path.name


@dataclass(frozen=True, slots=True)
class Told:
    """What a writer tells its rank.

    Attributes:
        what: ``saved`` answers :meth:`Writer.save`, ``copied`` comes when a copy to another place has ended, ``pruned``
            when old checkpoints could not be removed, ``gone`` when the process has ended, and ``ready`` answers all
            else.
        error: why it failed, in one line; None when it did not.
        superseded: whether it failed because the fence forbade it.
        seconds: that it took.
        value: what was asked for.
    """

    what: Literal["ready", "saved", "copied", "pruned", "gone"]
    error: str | None = None
    superseded: bool = False
    seconds: float = 0.0
    value: Any = None


class Saver:
    """The writers' part, on one rank. All ranks are asked for the same saves in the same order.

    Args:
        destination: where to.
        planner: what this rank writes.
        tell: told how all ended that a save is followed by.
    """

    def __init__(self, destination: Destination, planner: SavePlanner, tell: Callable[[Told], None]) -> None:
        self._to = destination
        self._planner = planner
        self._tell = tell
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._nodes: list[str] = [""] * self._world
        dist.all_gather_object(self._nodes, destination.node)
        self._first_here = self._nodes.index(destination.node) == self._rank
        self._copies: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._copy_for_ever, daemon=True, name="copies").start()

    def save(self, header: Mapping[str, Any], durable: bool) -> Told:
        """Write what is staged, and commit it; begin to copy it where else it belongs, and remove what has expired.

        Once it is committed it stays, whatever becomes of the rest.
        """
        begin = time.monotonic()
        first = manifest.snapshot_folder if self._to.disk else manifest.step_folder
        path = first(self._to.folder, header["step"])
        begun = False
        try:
            begun = on_rank_0(None, self._make_room, path, header["settings_digest"])
            names = self._write(path, header) if begun else []
        except (Exception, CheckpointException) as error:  # noqa: BLE001  whatever it is, training goes on
            say(f"checkpoint not saved: {path}: {one_line(error)}", sys.stderr)
            if begun and not self._to.fence.superseded:
                self._remove(path)  # where the disk is full, the next save needs the room
            return Told("saved", one_line(error), isinstance(error, SupersededError), time.monotonic() - begin)
        try:
            if begun:
                self._begin_copies(path, header, names, durable)
                self._prune_everywhere()
        except SupersededError as error:
            return Told("saved", one_line(error), True, time.monotonic() - begin)
        return Told("saved", seconds=time.monotonic() - begin)

    def finish(self) -> None:
        """Wait for the copies."""
        self._copies.join()

    def _write(self, path: Path, header: Mapping[str, Any]) -> list[str]:
        """Returns the names of this rank's files."""
        where = self._to.on_disk(path) if self._to.disk else path
        on_all_ranks(None, self._begin, path, where)
        save({}, storage_writer=FileSystemWriter(where), planner=self._planner)
        names = [file.name for file in where.glob(f"__{self._rank}_*.distcp")]
        names += [".metadata"] if self._rank == 0 else []
        copies: list[str] = []
        place = None
        if self._to.disk:
            place = {"node": self._to.node, "host": socket.gethostname(), "folder": str(where)}
            transfers = transfer.to_peers(self._nodes, on_all_ranks(None, lambda: names))
            on_all_ranks(None, transfer.exchange, transfers, where)
            copies = [each.name for each in transfers if each.target == self._rank]
        on_all_ranks(None, lambda: manifest.write_rank(path, self._rank, names, copies=copies, place=place))
        on_rank_0(None, self._commit, path, header)
        return names

    def _make_room(self, path: Path, settings_digest: str) -> bool:
        """Clear what an earlier attempt left of this step. False if that is a good checkpoint of the same training.

        A snapshot is written again in any case: its shards may lie on nodes that are not ours any more.
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
        """One that cannot begin ends in its turn, as one that fails.

        Raises:
            SupersededError: the fence forbids it.
        """
        try:
            if durable and self._to.disk:
                self._copy_to_folder(header, names)
            elif durable and self._to.url:
                self._copies.put(lambda: self._mirror(path))
        except SupersededError:
            raise
        except Exception as error:  # noqa: BLE001  what is committed is committed, and training goes on
            self._copies.put(partial(_raise, error))

    def _prune_everywhere(self) -> None:
        try:
            on_all_ranks(None, self._prune)
        except Exception as error:  # noqa: BLE001  as above
            say(f"old checkpoints not removed: {one_line(error)}", sys.stderr)
            self._tell(Told("pruned", one_line(error)))

    def _prune(self) -> None:
        if self._rank == 0:
            retention.thin(self._to.folder, "step", self._to.durable)
            retention.thin(self._to.folder, "snapshot", self._to.snapshots)
        if self._to.disk and self._first_here:
            retention.sweep(self._to.disk, self._to.folder.absolute(), self._to.snapshots)

    def _copy_to_folder(self, header: Mapping[str, Any], names: list[str]) -> None:
        """Begin to copy the snapshot that was just written to where durable ones are.

        Its files get a second name on this disk first, for as long as that lasts: the snapshot may be pruned.
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
            (held / name).unlink(missing_ok=True)
            os.link(snapshot / name, held / name)

    def _to_folder(self, path: Path, held: Path, header: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for name in expected:
            mirror.copy_durably(held / name, path / name)
            (held / name).unlink()
        with contextlib.suppress(OSError):
            held.rmdir()  # which the last rank on this node can
        manifest.write_rank(path, self._rank, expected, expected=expected)
        if self._rank == 0:
            self._commit(path, header)
        if self._to.url:
            self._mirror(path)

    def _mirror(self, path: Path) -> None:
        mirror.send(path, self._to.url, self._rank, self._world, COMMIT_DEADLINE_SECONDS)

    def _copy_for_ever(self) -> None:
        while True:
            work = self._copies.get()
            try:
                work()
                self._tell(Told("copied"))
            except Exception as error:  # noqa: BLE001  a copy that fails is told, and ends nothing
                say(f"checkpoint not copied: {one_line(error)}", sys.stderr)
                self._tell(Told("copied", one_line(error)))
            finally:
                self._copies.task_done()


def _raise(error: Exception) -> None:
    raise error
