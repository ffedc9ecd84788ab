"""The file ``manifest.json``: its fields, and how it is read together with the marker."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opt_ops.contract.checkpoint.fields import LARGEST_MANIFEST, checked
from opt_ops.contract.checkpoint.file_names import require_names
from opt_ops.contract.checkpoint.folders import MANIFEST, MARKER, CheckpointError
from opt_ops.contract.files import read_regular

VERSION = 1


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
    schedule: Mapping[str, Any] | None = None
    lr_factors: Sequence[Sequence[float]] = ()
    skips: Sequence[Sequence[int]] = ()
    data_since: Sequence[Sequence[int]] = ()
    model: Mapping[str, Any] | None = None
    guard: Mapping[str, Any] | None = None
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])


def text_of(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    fields = asdict(manifest)
    for name in ("nodes", "data_since"):
        if not fields[name]:
            del fields[name]
    return to_json({"v": VERSION} | fields)


def marker_of(text: bytes) -> bytes:
    """The text of the marker: the SHA-256 of the manifest."""
    return hashlib.sha256(text).hexdigest().encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``. Looks at no other file than the marker.

    Raises:
        CheckpointError: there is no marker, or the manifest is not the one that was committed, or is none.
        OSError: a file cannot be read.
    """
    marker = _read_marker(path)
    try:
        text = read_regular(path / MANIFEST, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(path, f"{MANIFEST} is missing") from None
    return parse(path, text, marker)


def parse(path: Path, text: bytes, marker: bytes) -> Manifest:
    """The manifest with this text, of the checkpoint ``path``.

    Raises:
        CheckpointError: the marker belongs to another text, or the text is no manifest, or a name in it is refused.
    """
    if marker != marker_of(text):
        raise CheckpointError(path, f"{MANIFEST} does not match the {MARKER} marker")
    try:
        fields = json.loads(text)
        version = fields.pop("v", None) if isinstance(fields, dict) else None
        if version != VERSION:
            raise CheckpointError(path, f"{MANIFEST} has version {version}, this program reads version {VERSION}")
        require_names(path, fields["files"] if isinstance(fields.get("files"), dict) else ())
        fields = checked(fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(path, f"{MANIFEST} is no manifest of this format: {error}") from error
    known = Manifest.__dataclass_fields__.keys()
    return Manifest(**{name: value for name, value in fields.items() if name in known})


def digest(path: Path) -> str:
    """The identity of the checkpoint ``path``: the SHA-256 of its manifest, from the marker.

    Raises:
        CheckpointError: there is no marker.
    """
    return _read_marker(path).decode().strip()


def _read_marker(path: Path) -> bytes:
    try:
        return read_regular(path / MARKER, 4096)
    except FileNotFoundError:
        raise CheckpointError(path, f"no {MARKER} marker: the save was never finished") from None


def to_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file of a checkpoint."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
