"""Sharded checkpoints: saved while training goes on, read into any layout, never trusted unseen."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from trainer import manifest
from trainer.errors import SupersededError, UserError
from trainer.fence import Fence
from trainer.lines import say
from trainer.manifest import CheckpointError, Manifest

# How long rank 0 waits for the slowest rank's part before it gives a checkpoint up.
COMMIT_DEADLINE_SECONDS = 600.0

_Result = TypeVar("_Result")


class Checkpointer:
    """Saves and loads the state of training: parameters, and AdamW's moments and step counts, by parameter name.

    There is nothing else to save. Data order, dropout and learning rate are functions of the step; the step, the data
    position and the tokens stand in the manifest; the optimizer's settings come from the configuration, so that a
    checkpoint can never bring old ones back.

    All collectives run on a gloo group of their own: in the background they would mix with those of training.
    """

    def __init__(self, folder: Path, state: dict[str, dict[str, Any]], fence: Fence) -> None:
        self._folder = folder
        self._fence = fence
        self._state = state
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._rank = dist.get_rank()
        # On GPUs into pinned memory, which is kept. (In torch 2.11, DefaultStager cannot be used twice.)
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._error: str | None = None

    def save(self, header: Mapping[str, Any]) -> None:
        """Copy the state and start writing it; return once the copy is made.

        Waits for the save before it, if that has not finished. A save that fails is reported on stderr and leaves no
        marker; training goes on. A good checkpoint of the same step and settings is left as it is. All ranks must call
        this at the same step.

        Args:
            header: the fields of the manifest except ``files``.
        """
        self.wait()
        staged = self._stager.stage(self._state)
        self._in_flight = self._background.submit(self._write, staged, header)

    def wait(self) -> bool:
        """Wait for the save in flight. Returns False if it failed; all ranks hear the same.

        Raises:
            SupersededError: on all ranks, when the fence forbade the save.
        """
        if self._in_flight is None:
            return True
        error = self._in_flight.exception()
        self._in_flight = None
        if isinstance(error, SupersededError):
            raise error
        return error is None

    def take_error(self) -> str | None:
        """Why a save has failed since this was last asked, in one line of at most 300 characters."""
        error, self._error = self._error, None
        return error

    def load(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read it into model and optimizer, whatever layout it was saved under.

        Raises:
            CheckpointError: on all ranks, when it is missing, torn or damaged.
            UserError: it holds another model.
        """
        return self._read(path, self._state)

    def load_weights(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read its parameters alone: a run begins with them.

        Raises:
            CheckpointError: on all ranks, when it is missing, torn or damaged.
            UserError: it holds another model.
        """
        return self._read(path, {"model": self._state["model"]})

    def _read(self, path: Path, state: dict[str, Any]) -> Manifest:
        found = self._on_rank_0(manifest.verify, path)
        reader = FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        self._require_same_model(stored, path)
        if "optimizer" in state and not any(name.startswith("optimizer.") for name in stored):
            raise UserError(f"{path} holds weights alone, and nothing to resume: begin a run with --init-from {path}.")
        load(state, storage_reader=reader, process_group=self._group)
        return found

    def _write(self, state: dict[str, Any], header: Mapping[str, Any]) -> None:
        path = manifest.step_folder(self._folder, header["step"])
        begun = False
        try:
            begun = self._on_rank_0(self._make_room, path, header["settings_digest"])
            if not begun:
                return
            save(state, storage_writer=FileSystemWriter(path), process_group=self._group)
            names = [file.name for file in path.glob(f"__{self._rank}_*.distcp")]
            self._on_all_ranks(
                manifest.write_rank, path, self._rank, [*names, ".metadata"] if self._rank == 0 else names
            )
            self._on_rank_0(self._commit, path, header)
        except (Exception, CheckpointException) as error:
            self._error = _one_line(error)
            say(f"checkpoint not saved: {path}: {self._error}", sys.stderr)
            if begun and self._rank == 0 and not self._fence.superseded:
                with contextlib.suppress(OSError):
                    manifest.remove(path)  # where the disk is full, the next save needs the room
            raise

    def _make_room(self, path: Path, settings_digest: str) -> bool:
        """Clear what an earlier attempt left of this step. False if that is a good checkpoint of the same training."""
        self._fence.check()
        if _is_good(path, settings_digest):
            return False
        if path.exists():
            manifest.remove(path)
        path.mkdir(parents=True)
        return True

    def _commit(self, path: Path, header: Mapping[str, Any]) -> None:
        manifest.commit(
            path,
            ranks=dist.get_world_size(),
            deadline_seconds=COMMIT_DEADLINE_SECONDS,
            header=header,
            before_marker=self._fence.check,
        )

    def _on_rank_0(self, work: Callable[..., _Result], *args: Any) -> _Result:
        """What ``work(*args)`` returns or raises on rank 0, on all ranks."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = work(*args)
            except (OSError, CheckpointError, SupersededError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _on_all_ranks(self, work: Callable[..., None], *args: Any) -> None:
        """Do ``work(*args)``. If it fails on one rank, it fails on all, at once."""
        errors: list[OSError | None] = [None] * dist.get_world_size()
        mine = None
        try:
            work(*args)
        except OSError as error:
            mine = error
        dist.all_gather_object(errors, mine, group=self._group)
        for rank, error in enumerate(errors):
            if error is not None:
                raise OSError(f"rank {rank}: {error}")

    def _require_same_model(self, metadata: Mapping[str, Any], path: Path) -> None:
        stored = {
            name: tuple(item.size)
            for name, item in metadata.items()
            if name.startswith("model.") and isinstance(item, TensorStorageMetadata)
        }
        live = {f"model.{name}": tuple(p.shape) for name, p in self._state["model"].items()}
        for name in sorted(stored.keys() | live.keys()):
            if stored.get(name) != live.get(name):
                raise UserError(
                    f"{path} is of another model: {name} is {stored.get(name, 'absent')} there and "
                    f"{live.get(name, 'absent')} here. Resume with the recipe and settings it was saved under."
                )


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # whose own text is a page of tracebacks
        causes = [f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items())]
    else:
        causes = [str(error) or repr(error)]
    return " ".join("; ".join(causes).split())[:300]


def _is_good(path: Path, settings_digest: str) -> bool:
    try:
        return manifest.verify(path).settings_digest == settings_digest
    except CheckpointError:
        return False
