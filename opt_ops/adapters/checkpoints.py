"""Committed checkpoints on the shared file system, examined against their manifests in a thread of their own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from opt_ops.core.values import Checkpoint
from trainer.manifest import CheckpointError, committed, verify


class FileCheckpoints:
    """`<run>/checkpoints/step-*/` of one lineage.

    One checkpoint at a time is read: the examination shares the file system with training. Hashing releases the GIL, so
    the tick goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examine")
        self._running: dict[str, tuple[Checkpoint, Future[str]]] = {}

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Those of the run that have their commit marker, oldest first."""
        found = committed(self._folder / run / "checkpoints")
        return [Checkpoint(run=run, step=step, path=str(path)) for step, path in found]

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare it with its manifest, unless that is under way."""
        if checkpoint.path not in self._running:
            self._running[checkpoint.path] = (checkpoint, self._pool.submit(_problem, checkpoint))

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """The examinations that ended since the last call, each with what is wrong; empty if nothing is."""
        ended = [path for path, (_, future) in self._running.items() if future.done()]
        return [(checkpoint, future.result()) for checkpoint, future in map(self._running.pop, ended)]


def _problem(checkpoint: Checkpoint) -> str:
    try:
        manifest = verify(Path(checkpoint.path))
    except (CheckpointError, OSError) as error:
        return str(error)
    if manifest.step != checkpoint.step:
        return f"the folder says step {checkpoint.step}, its manifest step {manifest.step}"
    return ""
