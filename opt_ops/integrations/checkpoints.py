"""Saves a checkpoint of several ranks: every file synced and hashed, the marker last."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opt_ops.contract import Options, Outside, SupersededError, commit, committed, remove, step_folder, write_rank
from opt_ops.contract.files import sync_folder
from opt_ops.contract.manifest import MARKER, pinned

_Result = TypeVar("_Result")

_DEADLINE_SECONDS = 1800.0
"""For the slowest rank to write its part. A rank that never does is found by its agent before that."""


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
        """Write a checkpoint. All ranks call it after the same update.

        Args:
            step: the update.
            write: writes the part of this rank into the folder that it gets.
            header: the fields of :class:`opt_ops.contract.Manifest` but ``step``, ``attempt``, ``ts`` and ``files``.

        Raises:
            SupersededError: a newer attempt exists. There is no marker then.
            CheckpointError: the files are those of the save before.
            OSError, TimeoutError: this rank or another could not write its part.
        """
        path = step_folder(self._folder, step)
        self._all_do(lambda: self._clear(path))
        written = self._all_do(lambda: write(path))
        for name in written.names:
            _sync(path / name)
        for folder in {(path / name).parent for name in written.names} | {path}:
            sync_folder(folder)
        write_rank(path, self._rank, written.names)
        if self._rank == 0:
            commit(
                path,
                ranks=self._world,
                deadline_seconds=_DEADLINE_SECONDS,
                header={"step": step, "attempt": self._attempt, "ts": time.time(), **header},
                before_marker=self._outside.check_fence,
            )
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

    def _all_do(self, act: Callable[[], _Result]) -> _Result:
        """Act, and wait until all ranks have done it. If it fails on one rank, it fails on all: nobody waits for it."""
        error: OSError | SupersededError | None = None
        result = None
        try:
            result = act()
        except (OSError, SupersededError) as caught:
            error = caught
        superseded, failed = isinstance(error, SupersededError), isinstance(error, OSError)
        superseded, failed = sum_over_ranks([float(superseded), float(failed)], self._world)
        if error:
            raise error
        if superseded:
            raise SupersededError("superseded: a newer attempt exists; nothing was saved")
        if failed:
            raise OSError("another rank could not write its part of the checkpoint. Its log has the reason.")
        return result  # pyright: ignore[reportReturnType]

    def _prune(self) -> None:
        if self._keep:
            for _, path in committed(self._folder)[: -self._keep]:
                if not pinned(path):
                    remove(path)


def sum_over_ranks(numbers: Sequence[float], world: int) -> list[float]:
    """The sums over all ranks, in double precision. Every rank calls it."""
    if world == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
