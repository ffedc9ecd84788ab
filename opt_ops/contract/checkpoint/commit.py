"""Write a checkpoint: the report of each rank, then the manifest, and the marker last of all."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.contract.checkpoint.file_names import require_names
from opt_ops.contract.checkpoint.folders import (
    MANIFEST,
    MARKER,
    CheckpointError,
    about_link,
    folders_of,
    link_on_the_way,
    rank_file,
)
from opt_ops.contract.checkpoint.manifest_file import Manifest, marker_of, parse, text_of, to_json
from opt_ops.contract.checkpoint.reading import require_consistent
from opt_ops.contract.files import open_regular, sync_folder, write_durably


def write_rank(
    path: Path,
    rank: int,
    names: Iterable[str],
    *,
    state: Iterable[str] = (),
    copies: Iterable[str] = (),
    place: Mapping[str, str] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> None:
    """Write ``rank-NNNN.json``: the files that ``rank`` has written, with sizes and hashes. The files are synced first.

    Args:
        path: the folder of the checkpoint.
        rank: the rank that reports.
        names: files that only this rank has written, relative to the folder, with ``/`` between the parts.
        state: those of ``names`` that training changes with every applied update: weights of which at least one is
            trained, and the optimizer's state. If such a file equals one of the save before, this save is stale.
        copies: for a snapshot: files of a rank on another node. This rank holds copies of them.
        place: for a snapshot: ``node``, its ``host``, and the ``folder`` there that holds the files.
        expected: what the report says about the files that ``names`` were copied from. Marks of state are taken over.

    Raises:
        CheckpointError: a name is refused, leads through a symbolic link, or is in ``state`` but not in ``names``.
        OSError: a file cannot be read or synced, or differs from the file it was copied from.
    """
    where = Path(place["folder"]) if place else path
    mine, theirs, marked = list(names), list(copies), set(state)
    require_names(path, [*mine, *theirs])
    if unknown := marked - set(mine):
        raise CheckpointError(path, f"{min(unknown)!r} is named as state, but not as a file of rank {rank}")
    marked |= {name for name, file in (expected or {}).items() if file.get("state")}
    files = _measure(path, where, mine)
    for name in marked & files.keys():
        files[name]["state"] = True
    report: dict[str, Any] = {"files": files}
    if expected is not None and files != expected:
        raise OSError(f"{path}: the files that arrived differ from those that were sent")
    if place:
        report |= {"copies": _measure(path, where, theirs), "place": dict(place)}
    write_durably(rank_file(path, rank), to_json(report))


def _measure(path: Path, where: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file in the folder ``where``. Files and folders are synced: the marker vouches for them."""
    files: dict[str, dict[str, Any]] = {}
    folders: set[Path] = {where}
    for name in sorted(names):
        if link := link_on_the_way(where, name):
            raise CheckpointError(path, f"the file name {name!r} is refused: {about_link(where, link)}")
        with os.fdopen(open_regular(where / name), "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": content}
            os.fsync(file.fileno())
        folders.update(folders_of(where, name))
    for folder in sorted(folders):
        sync_folder(folder)
    return files


def written_by(path: Path, rank: int) -> dict[str, dict[str, Any]]:
    """The files that ``rank`` reported, with sizes and hashes.

    Raises:
        OSError: there is no report.
    """
    return json.loads(rank_file(path, rank).read_text(encoding="utf-8"))["files"]


def commit(
    path: Path,
    *,
    ranks: int,
    deadline_seconds: float,
    header: Mapping[str, Any],
    poll_seconds: float = 0.05,
    before_marker: Callable[[], None] = lambda: None,
) -> None:
    """Wait for the reports of all ``ranks``, then write the manifest and, last of all, the marker.

    What :func:`opt_ops.contract.manifest.read` would refuse is not committed: a resume would come too late to find it.

    Args:
        path: the folder of the checkpoint.
        ranks: number of ranks that write into it.
        deadline_seconds: how long to wait for the slowest rank.
        header: the fields of :class:`Manifest` except ``files`` and ``nodes``.
        poll_seconds: time between two looks for reports.
        before_marker: called when everything but the marker is written. If it raises, there will be no marker.

    Raises:
        TimeoutError: a rank did not report in time. The folder stays without marker.
        CheckpointError: the shards are those of an earlier save, a copy differs from its original, two ranks report
            different files under one name, no rank reports a file of the folder, or a field has another type.
        OSError: a file cannot be read or written.
    """
    waiting = [rank_file(path, rank) for rank in range(ranks)]
    deadline = time.monotonic() + deadline_seconds
    while missing := [file for file in waiting if not file.exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: no {missing[0].name} after {deadline_seconds:.0f} s")
        time.sleep(poll_seconds)
    files, nodes = _merge(path, [json.loads(file.read_text(encoding="utf-8")) for file in waiting])
    text = text_of(Manifest(**header, files=files, nodes=nodes))
    marker = marker_of(text.encode())
    require_consistent(path, parse(path, text.encode(), marker))
    write_durably(path / MANIFEST, text)
    sync_folder(path.parent)  # that the folder itself is there after a crash
    before_marker()
    write_durably(path / MARKER, marker.decode())


def _merge(
    path: Path, reports: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """The files that ranks reported, and the nodes that hold them. A durable checkpoint has no nodes."""
    files: dict[str, dict[str, Any]] = {}
    nodes: dict[str, dict[str, str]] = {}
    for report in reports:
        for name, file in report["files"].items():
            first = files.setdefault(name, dict(file))
            if any(first[key] != file[key] for key in ("size", "sha256")):
                raise CheckpointError(path, f"two ranks report the file {name!r}, with different content")
            first |= file
        if place := report.get("place"):
            nodes[place["node"]] = {"host": place["host"], "folder": place["folder"]}
            for name in report["files"]:
                files[name].setdefault("nodes", []).append(place["node"])
    for report in reports:
        for name, copy in report.get("copies", {}).items():
            node = report["place"]["node"]
            if copy != {key: files[name][key] for key in copy}:
                raise CheckpointError(path, f"the copy of {name} on {node} differs from what was written")
            files[name]["nodes"].append(node)
    return files, nodes
