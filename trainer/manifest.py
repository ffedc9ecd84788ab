"""What makes a folder of shards a checkpoint: who wrote which bytes, and a marker that is written last.

Standard library only: a supervisor verifies checkpoints with this module and needs no torch for it.

The order is what makes it safe. Each rank hashes the files it wrote and says so in ``rank-NNNN.json``. When all ranks
have spoken, rank 0 merges them into ``manifest.json`` and then writes ``COMMITTED``, which holds the manifest's own
SHA-256. A crash at any point leaves a folder without marker, and that is not a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
VERSION = 1

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_RANK_FILE = re.compile(r"rank-\d{4,}\.json")


class CheckpointError(Exception):
    """A checkpoint that is missing, torn or damaged, and why. Exit code 65."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of ``manifest.json``; ``docs/formats.md`` gives the meaning of each field."""

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


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step-{step:08d}"


def committed(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints in ``folder`` that bear the marker, as (step, path), newest last. Reads no content."""
    if not folder.is_dir():
        return []
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in found if name and (path / MARKER).exists())


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` so that after a crash ``path`` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_rank(path: Path, rank: int, names: Iterable[str]) -> None:
    """Write ``rank-NNNN.json``: that ``rank`` has written the files ``names`` of ``path``, with sizes and hashes."""
    files = {name: _measure(path / name) for name in sorted(names)}
    write_durably(_rank_file(path, rank), _to_json({"files": files}))


def commit(
    path: Path,
    *,
    ranks: int,
    deadline_seconds: float,
    header: Mapping[str, Any],
    poll_seconds: float = 0.05,
    before_marker: Callable[[], None] = lambda: None,
) -> None:
    """Wait until all ``ranks`` have spoken, then write the manifest and, last of all, the marker.

    Args:
        path: the folder of the checkpoint.
        ranks: how many ranks write into it.
        deadline_seconds: how long to wait for the slowest.
        header: the fields of :class:`Manifest` except ``files``.
        poll_seconds: time between two looks.
        before_marker: called when all else is written; what it raises leaves the folder without marker.

    Raises:
        TimeoutError: a rank did not report in time; the folder stays without marker.
    """
    waiting = [_rank_file(path, rank) for rank in range(ranks)]
    deadline = time.monotonic() + deadline_seconds
    while missing := [file for file in waiting if not file.exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: no {missing[0].name} after {deadline_seconds:.0f} s")
        time.sleep(poll_seconds)
    files: dict[str, Any] = {}
    for file in waiting:
        files |= json.loads(file.read_text(encoding="utf-8"))["files"]
    manifest = Manifest(**header, files=files)
    text = _to_json({"v": VERSION} | asdict(manifest))
    write_durably(path / MANIFEST, text)
    before_marker()
    write_durably(path / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")


def verify(path: Path) -> Manifest:
    """Read every byte of the checkpoint ``path`` and compare it with what was written.

    Raises:
        CheckpointError: the checkpoint is missing, torn or damaged; ``why`` says which file and how.
    """
    if not path.is_dir():
        raise CheckpointError(path, "no such folder")
    manifest = _read_manifest(path)
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    for name in sorted(present - manifest.files.keys() - {MANIFEST, MARKER}):
        if not _RANK_FILE.fullmatch(name):
            raise CheckpointError(path, f"unexpected file {name}: the manifest does not name it")
    for name, expected in manifest.files.items():
        if name not in present:
            raise CheckpointError(path, f"{name} is missing")
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise CheckpointError(path, f"{name} has {size} bytes, the manifest says {expected['size']}")
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda name: _sha256(path / name), manifest.files)
        for (name, expected), digest in zip(manifest.files.items(), digests, strict=True):
            if digest != expected["sha256"]:
                raise CheckpointError(path, f"the content of {name} has changed since it was written (SHA-256 differs)")
    return manifest


def digest(path: Path) -> str:
    """What identifies the content of the checkpoint ``path``: the SHA-256 of its manifest, as the marker has it.

    Raises:
        CheckpointError: there is no marker.
    """
    return _read_marker(path).decode()


def remove(path: Path) -> None:
    """Delete the checkpoint ``path``, the marker first, so that a half-deleted one is never taken for a whole one."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read_manifest(path: Path) -> Manifest:
    marker = _read_marker(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(path, f"{MANIFEST} is missing") from None
    if marker != hashlib.sha256(text).hexdigest().encode():
        raise CheckpointError(path, f"{MANIFEST} does not match the {MARKER} marker")
    fields = json.loads(text)
    version = fields.pop("v")
    if version != VERSION:
        raise CheckpointError(path, f"{MANIFEST} has version {version}, this program reads version {VERSION}")
    known = Manifest.__dataclass_fields__.keys()
    return Manifest(**{name: value for name, value in fields.items() if name in known})


def _read_marker(path: Path) -> bytes:
    try:
        return (path / MARKER).read_bytes().strip()
    except FileNotFoundError:
        raise CheckpointError(path, f"no {MARKER} marker: the save was never finished") from None


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank:04d}.json"


def _measure(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
