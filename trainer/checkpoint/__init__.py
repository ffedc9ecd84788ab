"""Sharded checkpoints: saved while training goes on, read into any layout, never trusted unseen.

There is one way to save, and there are places to save to. Each rank copies its part of the state into memory that it
shares with a process of its own, the writer; that is all that holds training up. The writers of all ranks write shards,
hash them, and commit (``opt_ops/contract/manifest.py``). With a node-local disk they write there, send a copy to the
next node, and call it a snapshot; a durable checkpoint is then copied from it. Without one, they write
durable ones themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opt_ops.contract.manifest import Manifest
from trainer.checkpoint.agree import on_all_ranks
from trainer.checkpoint.loading import restore
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Destination, Told
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import Writer
from trainer.errors import SupersededError

__all__ = ["Checkpointer", "Destination", "Retention", "Writer"]


class Checkpointer:
    """Saves and loads ``state``: parameters, and AdamW's moments and step counts, by parameter name.

    There is little else to save. Data order, dropout and learning rate are functions of the step; the step, the data
    position, the tokens and the guard's state stand in the manifest; the optimizer's settings come from the
    configuration, so that a checkpoint can never bring old ones back.

    All collectives run on a gloo group of their own, those of a save between the writers: in the background they would
    mix with those of training.

    Args:
        writer: started before the process group.
        destination: where checkpoints go.
        state: ``model`` and ``optimizer``, as an engine tells it. Its tensors stay where they are.
        address: of rank 0's host.
    """

    def __init__(self, writer: Writer, destination: Destination, state: dict[str, Any], address: str) -> None:
        self._writer = writer
        self._to = destination
        self._state = state
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._staging = Staging(state, group)
        writer.join(self._staging, destination, address, group)
        self._saving = False
        self._saved: Told | None = None
        self._copied = True  # the last one: they end in the order of the saves
        self._error: str | None = None
        self._background_seconds = 0.0

    @property
    def background_seconds(self) -> float:
        """How long the writers worked on the newest save that has ended."""
        return self._background_seconds

    def save(self, header: Mapping[str, Any], durable: bool = True) -> None:
        """Copy the state and start writing it; return once the copy is made.

        Waits for the save before it, if that has not finished. A save that fails is reported on stderr and leaves no
        marker; training goes on. A good durable checkpoint of the same step and settings is left as it is. All ranks
        must call this at the same step.

        Args:
            header: the fields of the manifest except ``files`` and ``nodes``.
            durable: whether a snapshot is not enough.
        """
        self.wait()
        self._staging.copy()
        self._writer.save(header, durable)
        self._saving = True

    def wait(self) -> bool:
        """Wait for the save in flight, not for its copies. Returns False if it failed; all ranks hear the same.

        Raises:
            SupersededError: on all ranks, when the fence forbade the save.
        """
        while self._saving:
            self._note(self._writer.hear(wait=True))
        saved, self._saved = self._saved, None
        if saved and saved.superseded:
            raise SupersededError(saved.error)
        return saved is None or saved.error is None

    def finish(self) -> bool:
        """Wait for the save in flight and for all copies. Returns whether the last of both is good, on all ranks alike.

        Raises:
            SupersededError: on all ranks, when the fence forbade the save.
        """
        saved = self.wait()
        self._writer.finish()
        told = None
        while told is None or told.what not in ("ready", "gone"):
            told = self._writer.hear(wait=True)
            self._note(told)
        well = saved and self._copied and told.what == "ready"
        return all(on_all_ranks(self._group, lambda: well))

    def take_error(self) -> str | None:
        """Why a save or a copy has failed since this was last asked, in one line of at most 300 characters."""
        self._note(self._writer.hear(wait=False))
        error, self._error = self._error, None
        return error

    def load(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read it into the state, whatever layout it was saved under.

        Raises:
            CheckpointError: on all ranks, when it is missing, torn, damaged or stale.
            UserError: it holds another model.
        """
        return restore(path, self._state, self._group, self._to)

    def load_weights(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read its parameters alone: a run begins with them.

        Raises:
            CheckpointError: on all ranks, when it is missing, torn, damaged or stale.
            UserError: it holds another model.
        """
        return restore(path, {"model": self._state["model"]}, self._group, self._to)

    def _note(self, told: Told | None) -> None:
        if told is None:
            return
        if told.what in ("saved", "gone"):
            self._saving, self._saved = False, told
            self._background_seconds = told.seconds
        if told.what == "copied":
            self._copied = told.error is None
        if told.error:
            self._error = told.error
