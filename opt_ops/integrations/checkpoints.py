"""Saves a checkpoint of several ranks: every file synced and hashed, the marker last."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops.contract import Options, Outside, commit, committed, remove, step_folder, write_rank
from opt_ops.contract.manifest import MARKER, pinned
from opt_ops.integrations.agreement import all_do

log = logging.getLogger(__name__)

_DEADLINE_SECONDS = 60.0
"""For the reports of all ranks to be visible on rank 0. All ranks have written theirs by then; a shared file system may
show them late."""


@dataclass(frozen=True, slots=True)
class Written:
    """The files that one rank has written into a checkpoint.

    Attributes:
        names: relative paths with ``/``.
        state: those of them that change with every update that is applied.
    """

    names: frozenset[str]
    state: frozenset[str] = frozenset()


class Checkpoints:
    """The checkpoints of a run.

    Args:
        options: of this process, with a ``checkpoint_dir``.
        outside: has the fence.
        rank: of this process.
        world: number of ranks.
        keep: how many to keep, pinned ones not counted; 0: all.
    """

    def __init__(self, options: Options, outside: Outside, rank: int, world: int, keep: int) -> None:
        assert options.checkpoint_dir is not None
        self._folder: Path = options.checkpoint_dir
        self._attempt = options.attempt
        self._outside = outside
        self._rank, self._world, self._keep = rank, world, keep

    def save(self, step: int, write: Callable[[Path], Written], header: Mapping[str, Any]) -> None:
        """Write a checkpoint. All ranks call it after the same update, and it ends in the same way on all of them.

        Args:
            step: the update.
            write: writes the part of this rank into the folder that it gets.
            header: the fields of :class:`opt_ops.contract.Manifest` but ``step``, ``attempt``, ``ts`` and ``files``.

        Raises:
            SupersededError: a newer attempt exists. There is no marker then.
            CheckpointError: the files are those of the save before, or a resume would refuse them.
            OSError: this rank or another could not write its part. Nothing is left of the checkpoint.
        """
        path = step_folder(self._folder, step)
        try:
            all_do(lambda: self._clear(path), self._world, path)
            all_do(lambda: self._write_part(path, write), self._world, path)
            all_do(lambda: self._commit(path, {"step": step, **header}), self._world, path)
        except OSError:
            if self._rank == 0:  # a torn checkpoint is of no use, and the disk may be full because of it
                shutil.rmtree(path, ignore_errors=True)
            raise
        if self._rank == 0 and self._keep:
            self._prune()

    def _clear(self, path: Path) -> None:
        """Make an empty folder: rank 0 removes what a torn save, or a discarded attempt, has left of this step."""
        if self._rank != 0:
            return
        self._outside.check_fence()
        if path.exists():
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)
        path.mkdir(parents=True)

    def _write_part(self, path: Path, write: Callable[[Path], Written]) -> None:
        try:
            written = write(path)
        except Exception as error:
            # torch and safetensors raise errors of their own where the disk is full.
            if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
                raise OSError(str(_reason(error))) from error
            raise
        write_rank(path, self._rank, written.names, state=written.state)

    def _commit(self, path: Path, header: Mapping[str, Any]) -> None:
        if self._rank != 0:
            return
        commit(
            path,
            ranks=self._world,
            deadline_seconds=_DEADLINE_SECONDS,
            header={"attempt": self._attempt, "ts": time.time(), **header},
            before_marker=self._outside.check_fence,
        )

    def _prune(self) -> None:
        unpinned = [path for _, path in committed(self._folder) if not pinned(path)]
        for path in unpinned[: -self._keep]:
            try:
                remove(path)
            except OSError as error:
                log.warning("%s cannot be removed and stays: %s", path, error)


def _reason(error: BaseException) -> BaseException:
    """The OSError behind ``error``, where there is one."""
    cause = error
    while not isinstance(cause, OSError):
        following = cause.__cause__ or cause.__context__
        if following is None:
            return error
        cause = following
    return cause
