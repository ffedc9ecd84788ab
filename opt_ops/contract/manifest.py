"""The manifest of a checkpoint: which rank wrote which bytes. The commit marker is written after it.

A folder of shards is a checkpoint only if it has the marker. The supervisor verifies checkpoints with this module and
needs no torch for that.

The order of the writes makes it safe. Each rank hashes the files that it wrote and reports them in ``rank-NNNN.json``.
When all reports are there, rank 0 merges them into ``manifest.json``. Then it writes ``COMMITTED``, which holds the
SHA-256 of the manifest. A crash at any point leaves a folder without marker.

A durable checkpoint, ``step-…``, holds its shards. A snapshot, ``snapshot-…``, lies beside it and holds only the
manifest. Its shards are on the disks of the nodes that the manifest names, each on two.
"""

import hashlib
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from opt_ops.contract.files import read_regular, sha256, write_durably
from opt_ops.contract.manifest_fields import LARGEST_MANIFEST, checked

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
VERSION = 1
CheckpointKind = Literal["step", "snapshot"]

_FOLDER = re.compile(r"(step|snapshot)-([0-9]{8,18})")
_RANK_FILE = re.compile(r"rank-[0-9]{4,}\.json")


class CheckpointError(Exception):
    """A checkpoint is missing, torn or damaged. Exit code 65.

    Attributes:
        path: the checkpoint.
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of ``manifest.json``. ``docs/formats.md`` gives the meaning of each field."""

    step: int
    attempt: str
    ts: float
    layout: Mapping[str, int]
    data_position: int
    tokens: int
    settings_digest: str
    telemetry: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    seed: int | None = None
    schedule: Mapping[str, float] | None = None
    lr_factors: Sequence[Sequence[float]] = ()
    skips: Sequence[Sequence[int]] = ()
    model: Mapping[str, Any] | None = None
    guard: Mapping[str, Any] | None = None
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])


def step_folder(folder: Path, step: int) -> Path:
    """The path of the durable checkpoint of ``step``."""
    return folder / f"step-{step:08d}"


def snapshot_folder(folder: Path, step: int) -> Path:
    """The path of the snapshot of ``step``: in the run's folder for its manifest, in a node's folder for its shards."""
    return folder / f"snapshot-{step:08d}"


def committed(folder: Path, kind: CheckpointKind = "step") -> list[tuple[int, Path]]:
    """The checkpoints of one kind in ``folder`` that have the marker, as (step, path), newest last. Reads no content.

    Raises:
        OSError: the folder cannot be read.
    """
    return [(step, path) for step, path in folders(folder, kind) if (path / MARKER).exists()]


def folders(folder: Path, kind: CheckpointKind) -> list[tuple[int, Path]]:
    """The same, with or without the marker."""
    if not folder.is_dir():
        return []
    found = ((_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[2]), path) for name, path in found if name and name[1] == kind)


def write_rank(
    path: Path,
    rank: int,
    names: Iterable[str],
    *,
    copies: Iterable[str] = (),
    place: Mapping[str, str] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> None:
    """Write ``rank-NNNN.json``: the files that ``rank`` has written, with sizes and hashes.

    Args:
        path: the folder of the checkpoint.
        rank: the rank that reports.
        names: files that only this rank has written.
        copies: for a snapshot: files of a rank on another node. This rank holds copies of them.
        place: for a snapshot: ``node``, its ``host``, and the ``folder`` there that holds the files.
        expected: sizes and hashes of the files that ``names`` were copied from.

    Raises:
        OSError: a file cannot be read, or differs from the file it was copied from.
    """
    where = Path(place["folder"]) if place else path
    report: dict[str, Any] = {"files": {name: _measure(where / name) for name in sorted(names)}}
    if expected is not None and report["files"] != expected:
        raise OSError(f"{path}: the files that arrived differ from those that were sent")
    if place:
        report |= {"copies": {name: _measure(where / name) for name in sorted(copies)}, "place": dict(place)}
    write_durably(_rank_file(path, rank), _to_json(report))


def written_by(path: Path, rank: int) -> dict[str, dict[str, Any]]:
    """The files that ``rank`` reported, with sizes and hashes.

    Raises:
        OSError: there is no report.
    """
    return json.loads(_rank_file(path, rank).read_text(encoding="utf-8"))["files"]


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

    Args:
        path: the folder of the checkpoint.
        ranks: number of ranks that write into it.
        deadline_seconds: how long to wait for the slowest rank.
        header: the fields of :class:`Manifest` except ``files`` and ``nodes``.
        poll_seconds: time between two looks for reports.
        before_marker: called when everything but the marker is written. If it raises, there will be no marker.

    Raises:
        TimeoutError: a rank did not report in time. The folder stays without marker.
        CheckpointError: the shards are those of an earlier save, or a copy differs from its original.
        OSError: a file cannot be read or written.
    """
    waiting = [_rank_file(path, rank) for rank in range(ranks)]
    deadline = time.monotonic() + deadline_seconds
    while missing := [file for file in waiting if not file.exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: no {missing[0].name} after {deadline_seconds:.0f} s")
        time.sleep(poll_seconds)
    files, nodes = _merge(path, [json.loads(file.read_text(encoding="utf-8")) for file in waiting])
    manifest = Manifest(**header, files=files, nodes=nodes)
    if stale := _stale(path, manifest):
        raise CheckpointError(path, stale)
    fields = asdict(manifest)
    if not nodes:
        del fields["nodes"]
    text = _to_json({"v": VERSION} | fields)
    write_durably(path / MANIFEST, text)
    before_marker()
    write_durably(path / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")


def verify(path: Path) -> Manifest:
    """Read every byte of the checkpoint ``path`` and compare it with the manifest.

    A snapshot needs one good copy of each file. Files that only other hosts hold cannot be read from here. Each node
    has read its files back before the snapshot was committed. It reads them again before training resumes.

    Raises:
        CheckpointError: the checkpoint is missing, torn, damaged or stale. ``why`` names the file and the damage.
    """
    manifest = read(path)
    here = {place["folder"] for place in manifest.nodes.values() if place["host"] == socket.gethostname()}

    def problem(name: str) -> str:
        if not manifest.nodes:
            return damage(path, name, manifest)
        holders = [manifest.nodes[node]["folder"] for node in manifest.files[name]["nodes"]]
        damages = [damage(Path(folder), name, manifest) for folder in holders if folder in here]
        return "; ".join(damages) if all(damages) and len(damages) == len(holders) else ""

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for why in pool.map(problem, manifest.files):
            if why:
                raise CheckpointError(path, why)
    return manifest


def read(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``, after all checks that do not read the shards.

    Raises:
        CheckpointError: there is no checkpoint, or it is torn, misnamed or stale, or it holds a file that its manifest
            does not name.
    """
    if not path.is_dir():
        raise CheckpointError(path, "no such folder")
    manifest = _read_manifest(path)
    name = _FOLDER.fullmatch(path.name)
    if name and int(name[2]) != manifest.step:
        raise CheckpointError(path, f"the folder says step {int(name[2])}, its manifest step {manifest.step}")
    trained = manifest.telemetry.get("num_updates", manifest.step)
    if trained != manifest.step:
        raise CheckpointError(path, f"the manifest says step {manifest.step}, its telemetry step {trained}")
    if link := next((file for file in path.rglob("*") if file.is_symlink() and not _within(file, path)), None):
        raise CheckpointError(path, f"{link.relative_to(path)} is a link that leads out of the folder")
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    named = set() if manifest.nodes else set(manifest.files)
    for extra in sorted(present - named - {MANIFEST, MARKER}):
        if not _RANK_FILE.fullmatch(extra):
            raise CheckpointError(path, f"unexpected file {extra}: the manifest does not name it")
    for absent in sorted(named - present):
        raise CheckpointError(path, f"{absent} is missing")
    if stale := _stale(path, manifest):
        raise CheckpointError(path, stale)
    return manifest


def _within(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def damage(folder: Path, name: str, manifest: Manifest) -> str:
    """What is wrong with the file ``name`` in ``folder``. Empty if the file is as the manifest says."""
    expected = manifest.files[name]
    try:
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes, the manifest says {expected['size']}"
        if sha256(folder / name) != expected["sha256"]:
            return f"the content of {name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing" + (f" in {folder}" if manifest.nodes else "")
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return ""


def digest(path: Path) -> str:
    """The identity of the checkpoint ``path``: the SHA-256 of its manifest, from the marker.

    Raises:
        CheckpointError: there is no marker.
    """
    return _read_marker(path).decode().strip()


def pin(path: Path) -> None:
    """Protect the checkpoint ``path`` from pruning: create an empty file ``<path>.pinned`` beside it.

    Raises:
        OSError: the file cannot be created.
    """
    _pin_of(path).touch()


def pinned(path: Path) -> bool:
    """Whether the checkpoint ``path`` is pinned."""
    return _pin_of(path).exists()


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pinned")


def remove(path: Path) -> None:
    """Delete the checkpoint ``path``. The marker goes first: without it, a half-deleted folder is no checkpoint.

    Raises:
        OSError: a file cannot be deleted.
    """
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read_manifest(path: Path) -> Manifest:
    marker = _read_marker(path)
    try:
        text = read_regular(path / MANIFEST, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(path, f"{MANIFEST} is missing") from None
    if marker != hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(path, f"{MANIFEST} does not match the {MARKER} marker")
    try:
        fields = json.loads(text)
        version = fields.pop("v", None) if isinstance(fields, dict) else None
        if version != VERSION:
            raise CheckpointError(path, f"{MANIFEST} has version {version}, this program reads version {VERSION}")
        fields = checked(fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(path, f"{MANIFEST} is no manifest of this format: {error}") from error
    require_plain(path, fields["files"])
    known = Manifest.__dataclass_fields__.keys()
    return Manifest(**{name: value for name, value in fields.items() if name in known})


def require_plain(path: Path, names: Iterable[str]) -> None:
    """Refuse a manifest whose file names lead out of its folder: a download writes to these names.

    Raises:
        CheckpointError: one of ``names`` is not a plain file name.
    """
    for name in names:
        if name == ".." or Path(name).name != name:
            raise CheckpointError(path, f"{MANIFEST} names {name!r}, which is not a file of this folder")


def _read_marker(path: Path) -> bytes:
    try:
        return read_regular(path / MARKER, 4096)
    except FileNotFoundError:
        raise CheckpointError(path, f"no {MARKER} marker: the save was never finished") from None


def _merge(
    path: Path, reports: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """The files that ranks reported, and the nodes that hold them. A durable checkpoint has no nodes."""
    files: dict[str, dict[str, Any]] = {}
    nodes: dict[str, dict[str, str]] = {}
    for report in reports:
        files |= report["files"]
        if place := report.get("place"):
            nodes[place["node"]] = {"host": place["host"], "folder": place["folder"]}
            for name in report["files"]:
                files[name]["nodes"] = [place["node"]]
    for report in reports:
        for name, copy in report.get("copies", {}).items():
            node = report["place"]["node"]
            if copy != {key: files[name][key] for key in copy}:
                raise CheckpointError(path, f"the copy of {name} on {node} differs from what was written")
            files[name]["nodes"].append(node)
    return files, nodes


def earlier(path: Path, step: int) -> list[tuple[int, Path]]:
    """The committed checkpoints of both kinds beside ``path``, of steps before ``step``, newest last."""
    if not _FOLDER.fullmatch(path.name):
        return []
    found = committed(path.parent, "step") + committed(path.parent, "snapshot")
    return sorted(each for each in found if each[0] < step)


def all_skipped(before: Manifest, after: Manifest) -> bool:
    """Whether every update between two saves was skipped. Then both hold the same state."""
    skipped = after.telemetry.get("skipped", 0) - before.telemetry.get("skipped", 0)
    return skipped >= after.step - before.step


def _stale(path: Path, manifest: Manifest) -> str:
    """What is stale, or empty. Training changes every shard in every update, so no shard may equal an earlier one.

    Shards that are much smaller than the largest are not compared: a rank may hold only empty parts.
    """
    found = earlier(path, manifest.step)
    if not found:
        return ""
    step, last = found[-1]
    try:
        before = _read_manifest(last)
    except (CheckpointError, OSError):
        return ""  # the earlier checkpoint is damaged or was just removed; that says nothing about this one
    if all_skipped(before, manifest):
        return ""
    known = {file["sha256"] for name, file in before.files.items() if name.endswith(".distcp")}
    shards = {name: file for name, file in manifest.files.items() if name.endswith(".distcp")}
    large = max((file["size"] for file in shards.values()), default=0) / 10
    same = sorted(name for name, file in shards.items() if file["sha256"] in known and file["size"] >= large)
    return f"stale: {same[0]} holds the same as in {last.name}, {manifest.step - step} steps before" if same else ""


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank:04d}.json"


def _measure(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
