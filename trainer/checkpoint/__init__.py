"""Sharded checkpoints: saved while training continues, verified before use, loaded into any layout.

Each rank has a process of its own, the writer, and shares memory with it. To save, the rank copies its part of the
state into that memory; only this copy holds training up. The writers of all ranks then write shards, hash them, and
commit (``opt_ops/contract/manifest.py``). With a node-local disk they write a snapshot there and send a copy of it to
the next node. A durable checkpoint is then copied from the snapshot. Without such a disk they write durable ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opt_ops.contract.fence import SupersededError
from opt_ops.contract.manifest import Manifest
from trainer.checkpoint.agree import on_all_ranks
from trainer.checkpoint.loading import restore
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save import Destination, WriterReport
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import Writer

__all__ = ["Checkpointer", "Destination", "Retention", "Writer"]


class Checkpointer:
    """Saves and loads ``state``: the parameters, and the moments and step counts of AdamW, by parameter name.

    There is little else to save. Data order, dropout and learning rate are functions of the step. The manifest holds
    the step, the data position, the tokens and the state of the guard. The settings of the optimizer come from the
    configuration, so a checkpoint can never bring old settings back.

    The collectives of a save run between the writers, because in the background they would mix with those of training.

    Args:
        writer: started before the process group.
        destination: where checkpoints go.
        state: ``model`` and ``optimizer``, from an engine. Its tensors must stay in place.
        address: the host of rank 0.
        group: of all ranks, for what the host exchanges (default: the default group).
    """

    def __init__(
        self,
        writer: Writer,
        destination: Destination,
        state: dict[str, Any],
        address: str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._writer = writer
        self._to = destination
        self._state = state
        self._staging = Staging(state, group)
        self._background_seconds = 0.0
        self._begin(address, group)

    def _begin(self, address: str, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._writer.join(self._staging, self._to, address, group)
        self._saving = False
        self._saved: WriterReport | None = None
        self._copied = True  # whether the last copy is good; copies end in the order of the saves
        self._error: str | None = None

    def rejoin(self, address: str, group: dist.ProcessGroup | None) -> None:
        """Go on with the ranks of a newer generation, some of which are new. A save in flight is given up.

        The writer was renewed before. A new rank makes its :class:`Checkpointer` meanwhile.

        Args:
            address: the host of rank 0.
            group: of all ranks, for what the host exchanges.

        Raises:
            RuntimeError: a peer was lost, or the writer has ended.
        """
        self._staging.agree(group)
        self._begin(address, group)

    @property
    def background_seconds(self) -> float:
        """Seconds that the writers needed for the newest save that has ended."""
        return self._background_seconds

    def save(self, header: Mapping[str, Any], durable: bool = True) -> None:
        """Copy the state, let the writer start, and return.

        This first waits for a save in flight. A save that fails is logged and leaves no marker; training continues. A
        good durable checkpoint of the same step and settings is kept as it is. All ranks must call this at the same
        step.

        Args:
            header: the fields of the manifest except ``files`` and ``nodes``.
            durable: whether a durable checkpoint is needed. Otherwise a snapshot is enough.

        Raises:
            SupersededError: on all ranks, if the fence stopped the save in flight.
        """
        self.wait()
        self._staging.copy()
        self._writer.save(header, durable)
        self._saving = True

    def wait(self) -> bool:
        """Wait for the save in flight, but not for its copies. Returns False if it failed, on all ranks alike.

        Raises:
            SupersededError: on all ranks, if the fence stopped the save.
        """
        while self._saving:
            self._note(self._writer.receive(wait=True))
        saved, self._saved = self._saved, None
        if saved and saved.superseded:
            raise SupersededError(saved.error)
        return saved is None or saved.error is None

    def finish(self) -> bool:
        """Wait for the save in flight and for all copies. Returns whether the last of both is good, on all ranks alike.

        Raises:
            SupersededError: on all ranks, if the fence stopped the save.
        """
        saved = self.wait()
        self._writer.finish()
        report = None
        while report is None or report.what not in ("ready", "gone"):
            report = self._writer.receive(wait=True)
            self._note(report)
        good = saved and self._copied and report.what == "ready"
        return all(on_all_ranks(self._group, lambda: good))

    def take_error(self) -> str | None:
        """Why a save or a copy has failed since the last call: one line of at most 300 characters, or None."""
        self._note(self._writer.receive(wait=False))
        error, self._error = self._error, None
        return error

    def load(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read it into the state. It may have been saved in another layout.

        Raises:
            CheckpointError: on all ranks, if it is missing, torn, damaged or stale.
            UserError: it holds another model, or only weights.
        """
        return restore(path, self._state, self._group, self._to)

    def load_weights(self, path: Path) -> Manifest:
        """Verify the checkpoint ``path`` and read only its parameters, for a run that starts with them.

        Raises:
            CheckpointError: on all ranks, if it is missing, torn, damaged or stale.
            UserError: it holds another model.
        """
        return restore(path, {"model": self._state["model"]}, self._group, self._to)

    def _note(self, report: WriterReport | None) -> None:
        if report is None:
            return
        if report.what in ("saved", "gone"):
            self._saving, self._saved = False, report
            self._background_seconds = report.seconds
        if report.what == "copied":
            self._copied = report.error is None
        if report.error:
            self._error = report.error
