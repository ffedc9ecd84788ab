"""Committed checkpoints on the shared file system. A thread compares them with their manifests."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from opt_ops.contract.manifest import MARKER, CheckpointError, committed, pin, read, verify
from opt_ops.core.values import Checkpoint


class FileCheckpoints:
    """The checkpoints of one lineage: `<run>/checkpoints/step-*/`, and `snapshot-*/` beside them.

    The examination reads one checkpoint at a time, because it shares the file system with training. Hashing releases
    the GIL, so the daemon's tick is not held up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examine")
        self._running: dict[str, tuple[Checkpoint, Future[str]]] = {}
        self._places: dict[Path, tuple[int, tuple[tuple[str, ...], ...]]] = {}

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Return the committed checkpoints of a run, durable ones and snapshots, oldest first."""
        folder = self._folder / run / "checkpoints"
        found = sorted(committed(folder, "step") + committed(folder, "snapshot"))
        return [Checkpoint(run=run, step=step, path=str(path), nodes=self._nodes(path)) for step, path in found]

    def _nodes(self, path: Path) -> tuple[tuple[str, ...], ...]:
        """The groups of nodes whose disks hold a snapshot. Its manifest is read again if it was written again."""
        if not path.name.startswith("snapshot-"):
            return ()
        try:
            written = (path / MARKER).stat().st_mtime_ns
            if self._places.get(path, (0, ()))[0] != written:
                groups = {tuple(file["nodes"]) for file in read(path).files.values()}
                self._places[path] = written, tuple(sorted(groups))
            return self._places[path][1]
        except (CheckpointError, OSError):
            return (("?",),)  # just pruned, or damaged, which the examination will find: no node holds it

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare a checkpoint with its manifest, unless that is under way."""
        if checkpoint.path not in self._running:
            self._running[checkpoint.path] = (checkpoint, self._pool.submit(problem, checkpoint))

    def pin(self, checkpoint: Checkpoint) -> None:
        """Protect a checkpoint from pruning, if it still exists."""
        with contextlib.suppress(OSError):  # a full disk; it is not tried again
            pin(Path(checkpoint.path))

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """Return the examinations that ended since the last call, each with its problem; empty: no problem."""
        ended = [path for path, (_, future) in self._running.items() if future.done()]
        return [(checkpoint, future.result()) for checkpoint, future in map(self._running.pop, ended)]


def problem(checkpoint: Checkpoint) -> str:
    """Read every byte of a checkpoint. Returns its problem; empty: none."""
    try:
        verify(Path(checkpoint.path))
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""
