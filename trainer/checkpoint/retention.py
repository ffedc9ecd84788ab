"""Which checkpoints are kept: pinned ones always, and the newest. Unfinished ones are removed."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointKind

ORIGIN = "origin"
"""A file in a node's folder of a snapshot. It holds the path of the folder with the manifest."""

HELD = "copying-"
"""Prefix of a folder on a node's disk, before the step. It holds second names of shards while they are copied."""

# NFS may hide a new file for a minute. A snapshot that is younger than this may just not be visible yet.
_VISIBLE_AFTER_SECONDS = 600.0

# A folder without a write for this long is abandoned. Rank 0 waits much less for the other ranks.
_ABANDONED_SECONDS = 4 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints of one kind are kept: the ``newest``, and for a while the first one of each time span before.

    Spans are those of the clock. If they were counted from the newest checkpoint, the one that a span needs would be
    gone before that span begins.

    Attributes:
        newest: how many are kept at any age; 0 keeps all.
        span_seconds: length of a span; 0 keeps no older ones.
        seconds: age up to which older ones are kept.
    """

    newest: int
    span_seconds: float = 0.0
    seconds: float = 0.0


EVERYTHING = Retention(newest=0)


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A committed checkpoint, with what decides whether it is kept. ``at`` is the time of its commit."""

    path: Path
    step: int
    at: float
    pinned: bool


def expired(found: Iterable[SavedCheckpoint], rule: Retention, now: float) -> list[SavedCheckpoint]:
    """The checkpoints of one run and kind that are to be removed."""
    if rule.newest == 0:
        return []
    by_age = sorted(found, key=lambda saved: saved.step, reverse=True)
    going: list[SavedCheckpoint] = []
    kept_of: dict[int, SavedCheckpoint] = {}
    for saved in by_age[rule.newest :]:
        if saved.pinned:
            continue
        if rule.span_seconds <= 0 or now - saved.at > rule.seconds:
            going.append(saved)
            continue
        span = int(saved.at // rule.span_seconds)
        if span in kept_of:  # this one is earlier in the span, so the later one goes
            going.append(kept_of[span])
        kept_of[span] = saved
    return going


def saved_in(folder: Path, kind: CheckpointKind) -> list[SavedCheckpoint]:
    """The committed checkpoints of one kind in the folder of a run.

    Raises:
        OSError: the folder cannot be read.
    """
    found: list[SavedCheckpoint] = []
    for step, path in manifest.committed(folder, kind):
        with contextlib.suppress(FileNotFoundError):  # another node has just removed it
            at = (path / manifest.MARKER).stat().st_mtime
            found.append(SavedCheckpoint(path, step, at, manifest.pinned(path)))
    return found


def thin(folder: Path, kind: CheckpointKind, rule: Retention, abandoned_seconds: float = _ABANDONED_SECONDS) -> None:
    """Remove the expired checkpoints of a run, and unfinished ones that a dead attempt has left.

    Args:
        folder: the checkpoint folder of the run.
        kind: of the checkpoints.
        rule: which are kept.
        abandoned_seconds: an unfinished one is removed this long after the last write to it.

    Raises:
        OSError: a checkpoint cannot be removed.
    """
    for saved in expired(saved_in(folder, kind), rule, time.time()):
        with contextlib.suppress(FileNotFoundError):
            manifest.remove(saved.path)
    for _, path in manifest.folders(folder, kind):
        if not (path / manifest.MARKER).exists() and _abandoned(path, abandoned_seconds):
            manifest.remove(path)


def _abandoned(path: Path, seconds: float) -> bool:
    """Whether nothing was written into the folder ``path`` for this long."""
    try:
        return path.is_dir() and time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*"))) > seconds
    except FileNotFoundError:
        return False  # something in it was just removed


def sweep(
    node_folder: Path,
    current: Path,
    rule: Retention,
    visible_after_seconds: float = _VISIBLE_AFTER_SECONDS,
    abandoned_seconds: float = _ABANDONED_SECONDS,
) -> None:
    """Remove shards from a node's disk: those of removed snapshots, and those of old snapshots of earlier runs.

    Also remove the second names of shards for a copy that never ended, because they keep their room on the disk.

    Args:
        node_folder: folder with this node's snapshots of all runs, one subfolder per run.
        current: folder with the manifests of this run. Its snapshots are not removed for their age here.
        rule: how long snapshots of earlier runs are kept.
        visible_after_seconds: younger snapshots are left alone.
        abandoned_seconds: second names are left alone for this long after the last write.

    Raises:
        OSError: something cannot be read or removed.
    """
    for note in node_folder.glob(f"*/snapshot-*/{ORIGIN}"):
        origin = Path(note.read_text(encoding="utf-8").strip())
        if time.time() - note.stat().st_mtime < visible_after_seconds or not origin.parent.is_dir():
            continue  # not committed yet, or on a file system that is not mounted at the moment
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
