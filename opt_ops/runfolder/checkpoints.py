"""Committed checkpoints on the shared file system. A thread compares them with their manifests."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from opt_ops.contract.manifest import MARKER, CheckpointError, committed, pin, read, unpin, verify
from opt_ops.core.text import clean
from opt_ops.core.values import Checkpoint

_LONGEST_WHY = 1000  # characters: names of files in a manifest are as long as somebody wants


class FileCheckpoints:
    """The checkpoints of one lineage: `<run>/checkpoints/step-*/`, and `snapshot-*/` beside them.

    The examination reads one checkpoint at a time, because it shares the file system with training. Hashing releases
    the GIL, so the daemon's tick is not held up. Its thread is a daemon thread: a process that ends does not wait for
    hundreds of gigabytes to be read. The next process examines them again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._waiting: deque[Checkpoint] = deque()
        self._asked: set[str] = set()  # paths that wait, are read, or whose result was not fetched yet
        self._results: list[tuple[Checkpoint, str]] = []
        self._reads = False  # whether a thread is at work
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
        except Exception:  # noqa: BLE001 - just pruned, or damaged in any way, which the examination will find
            return (("?",),)  # no node holds it

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin to compare a checkpoint with its manifest, unless that is under way."""
        with self._lock:
            if checkpoint.path in self._asked:
                return
            self._asked.add(checkpoint.path)
            self._waiting.append(checkpoint)
            if not self._reads:
                self._reads = True
                threading.Thread(target=self._read_all, name="examine", daemon=True).start()

    def _read_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._reads = False
                    return
                checkpoint = self._waiting.popleft()
            found = problem(checkpoint)
            with self._lock:
                self._results.append((checkpoint, found))

    def close(self) -> None:
        """Begin no other examination, and wait for none. The next daemon process examines what is left."""
        with self._lock:
            self._waiting.clear()

    def written(self, checkpoint: Checkpoint) -> int:
        """Return when the checkpoint was committed (ns); 0 if it is gone."""
        try:
            return (Path(checkpoint.path) / MARKER).stat().st_mtime_ns
        except OSError:
            return 0

    def pin(self, checkpoint: Checkpoint, holder: str = "") -> None:
        """Protect a checkpoint from pruning, if it still exists: until `holder` lets it go, or for good."""
        with contextlib.suppress(OSError):  # a full disk; it is not tried again
            pin(Path(checkpoint.path), holder)

    def unpin(self, checkpoint: Checkpoint, holder: str) -> None:
        """End the protection that `holder` asked for."""
        with contextlib.suppress(OSError):  # a checkpoint too many is kept
            unpin(Path(checkpoint.path), holder)

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """Return the examinations that ended since the last call, each with its problem; empty: no problem."""
        with self._lock:
            ended, self._results = self._results, []
            self._asked -= {checkpoint.path for checkpoint, _ in ended}
        return ended


def problem(checkpoint: Checkpoint) -> str:
    """Read every byte of a checkpoint. Returns its problem; empty: none."""
    try:
        verify(Path(checkpoint.path))
    except (CheckpointError, OSError) as error:
        return clean(str(error), _LONGEST_WHY)
    except Exception as error:  # noqa: BLE001 - what cannot be read must not end the thread that examines all others
        return clean(f"it cannot be read: {type(error).__name__}: {error}", _LONGEST_WHY)
    return ""
