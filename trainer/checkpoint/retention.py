"""Which checkpoints are kept: pinned ones always, and the newest. What was never finished goes."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opt_ops.contract import manifest
from opt_ops.contract.manifest import Tier

ORIGIN = "origin"
"""In a node's folder of a snapshot: where its manifest is."""

HELD = "copying-"
"""On a node's disk, with the step behind it: second names of a snapshot's shards, while they are being copied."""

# NFS may say for a minute that a new file is not there.
_SETTLED_SECONDS = 600.0

# So long after the last write a folder is taken for abandoned: far longer than rank 0 waits for another's part.
_ABANDONED_SECONDS = 4 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept of one tier: the ``newest``, and of older ones the first of each span of time, for a while.

    Spans are of the clock and not counted from the newest: else the one that a span needs would be gone before the
    span has come.

    Attributes:
        newest: how many are kept whatever their age; 0: all.
        span_seconds: from how much time one is kept; 0: none.
        seconds: how long.
    """

    newest: int
    span_seconds: float = 0.0
    seconds: float = 0.0


EVERYTHING = Retention(newest=0)


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint, for the choice of what is kept."""

    path: Path
    step: int
    at: float
    pinned: bool


def expired(found: Iterable[Saved], rule: Retention, now: float) -> list[Saved]:
    """Those of one run and tier that go."""
    if rule.newest == 0:
        return []
    by_age = sorted(found, key=lambda saved: saved.step, reverse=True)
    going: list[Saved] = []
    kept_of: dict[int, Saved] = {}
    for saved in by_age[rule.newest :]:
        if saved.pinned:
            continue
        if rule.span_seconds <= 0 or now - saved.at > rule.seconds:
            going.append(saved)
            continue
        span = int(saved.at // rule.span_seconds)
        if span in kept_of:  # a later one of the span: this one is its first
            going.append(kept_of[span])
        kept_of[span] = saved
    return going


def saved_in(folder: Path, tier: Tier) -> list[Saved]:
    """The committed checkpoints of a run and tier."""
    found: list[Saved] = []
    for step, path in manifest.committed(folder, tier):
        with contextlib.suppress(FileNotFoundError):  # another node has just removed it
            found.append(Saved(path, step, (path / manifest.MARKER).stat().st_mtime, manifest.pinned(path)))
    return found


def thin(folder: Path, tier: Tier, rule: Retention, abandoned_seconds: float = _ABANDONED_SECONDS) -> None:
    """Remove what has expired of a run's checkpoints, and what an attempt that died has left unfinished.

    Raises:
        OSError: it cannot be removed.
    """
    for saved in expired(saved_in(folder, tier), rule, time.time()):
        with contextlib.suppress(FileNotFoundError):
            manifest.remove(saved.path)
    for _, path in manifest.folders(folder, tier):
        if not (path / manifest.MARKER).exists() and _abandoned(path, abandoned_seconds):
            manifest.remove(path)


def _abandoned(path: Path, seconds: float) -> bool:
    """Whether nobody has written into the folder ``path`` for so long."""
    try:
        return time.time() - max(each.stat().st_mtime for each in (path, *path.iterdir())) > seconds
    except (FileNotFoundError, NotADirectoryError):
        return False  # gone, or no folder of ours


def sweep(
    node_folder: Path,
    current: Path,
    rule: Retention,
    settled_seconds: float = _SETTLED_SECONDS,
    abandoned_seconds: float = _ABANDONED_SECONDS,
) -> None:
    """Remove from a node's disk the shards of snapshots that are not there any more; let those of earlier runs go.

    What was held for a copy that never ended goes, too: the second names of shards keep their room on the disk.

    Args:
        node_folder: where this node's snapshots of all runs are, each in a folder of its run.
        current: where this run's manifests are: its snapshots are thinned, and do not go for their age alone.
        rule: how long snapshots of earlier runs are kept.
        settled_seconds: younger ones are left alone.
        abandoned_seconds: what was held for a copy is left alone for as long.

    Raises:
        OSError: something cannot be read or removed.
    """
    for note in node_folder.glob(f"*/snapshot-*/{ORIGIN}"):
        origin = Path(note.read_text(encoding="utf-8").strip())
        if time.time() - note.stat().st_mtime < settled_seconds or not origin.parent.is_dir():
            continue  # not committed yet, or on a file system that is not mounted just now
        marker = origin / manifest.MARKER
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - marker.stat().st_mtime > rule.seconds
            if old and origin.parent != current and not manifest.pinned(origin):
                manifest.remove(origin)
        if not marker.exists():
            manifest.remove(note.parent)
    for held in node_folder.glob(f"*/{HELD}*"):
        if _abandoned(held, abandoned_seconds):
            shutil.rmtree(held)
