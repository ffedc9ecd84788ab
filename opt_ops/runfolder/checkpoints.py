"""Committed checkpoints on the shared file system, examined against their manifests in a thread of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from opt_ops.contract.manifest import MARKER, CheckpointError, committed, pin, read, verify
from opt_ops.core.values import Checkpoint


class FileCheckpoints:
    """`<run>/checkpoints/step-*/`, and `snapshot-*/` beside them, of one lineage.

    One checkpoint at a time is read: the examination shares the file system with training. Hashing releases the GIL, so
    the tick goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examine")
        self._running: dict[str, tuple[Checkpoint, Future[str]]] = {}
        self._places: dict[Path, tuple[int, tuple[tuple[str, ...], ...]]] = {}

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Those of the run that have their commit marker, durable ones and snapshots, oldest first."""
        folder = self._folder / run / "checkpoints"
        found = sorted(committed(folder, "step") + committed(folder, "snapshot"))
        return [Checkpoint(run=run, step=step, path=str(path), nodes=self._nodes(path)) for step, path in found]

    def _nodes(self, path: Path) -> tuple[tuple[str, ...], ...]:
        """Whose disks it is on: read once, and again when it was written anew."""
        if not path.name.startswith("snapshot-"):
            return ()
        try:
            written = (path / MARKER).stat().st_mtime_ns
            if self._places.get(path, (0, ()))[0] != written:
                groups = {tuple(file["nodes"]) for file in read(path).files.values()}
                self._places[path] = written, tuple(sorted(groups))
            return self._places[path][1]
        except (CheckpointError, OSError):
            return (("?",),)  # pruned just now, or damaged, as the examination will tell: nobody has it

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare it with its manifest, unless that is under way."""
        if checkpoint.path not in self._running:
            self._running[checkpoint.path] = (checkpoint, self._pool.submit(problem, checkpoint))

    def pin(self, checkpoint: Checkpoint) -> None:
        """Forbid that it is pruned, if it is still there."""
        with contextlib.suppress(OSError):  # a disk without room; it is not tried again
            pin(Path(checkpoint.path))

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """The examinations that ended since the last call, each with what is wrong; empty if nothing is."""
        ended = [path for path, (_, future) in self._running.items() if future.done()]
        return [(checkpoint, future.result()) for checkpoint, future in map(self._running.pop, ended)]


def problem(checkpoint: Checkpoint) -> str:
    """What is wrong with a checkpoint, every byte of which is read now; empty if nothing is."""
    try:
        verify(Path(checkpoint.path))
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""
