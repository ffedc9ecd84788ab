"""Damages copies of a checkpoint, each in one way that a trainer must refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opt_ops.contract.manifest import MANIFEST, MARKER


def copied(path: Path, folder: Path) -> Path:
    """Copy a checkpoint into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(path, folder / path.name, symlinks=True))


def without_marker(path: Path) -> None:
    """The save was never finished."""
    (path / MARKER).unlink()


def cut(path: Path) -> None:
    """The largest file has lost its second half."""
    file = _largest(path)
    os.truncate(file, file.stat().st_size // 2)


def without_shard(path: Path) -> None:
    """The largest file is missing."""
    _largest(path).unlink()


def flip(path: Path) -> None:
    """One byte in the middle of the largest file has changed."""
    file = _largest(path)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 0x10]))


TORN: Mapping[str, Callable[[Path], None]] = {
    "the marker missing": without_marker,
    "a file cut": cut,
    "a file missing": without_shard,
}


def make_stale(path: Path, before: Path) -> list[str]:
    """Give a checkpoint the state of the save before, with a manifest and a marker that fit. Returns the files.

    State is what the manifest marks so, else the shards `*.distcp`, else every file.

    Raises:
        OSError, ValueError: a manifest cannot be read.
    """
    manifest, old = _manifest(path), _manifest(before)
    names = {_plain(name): name for name in old["files"]}
    marked = [name for name, file in manifest["files"].items() if file.get("state") is True]
    shards = [name for name in manifest["files"] if name.endswith(".distcp")]
    taken = [name for name in marked or shards or manifest["files"] if _plain(name) in names]
    for name in taken:
        shutil.copyfile(before / names[_plain(name)], path / name)
        content = (path / name).read_bytes()
        manifest["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for report in path.glob("rank-[0-9]*.json"):
        told = json.loads(report.read_text(encoding="utf-8"))
        for name, file in told.get("files", {}).items():
            file.update({key: manifest["files"][name][key] for key in ("size", "sha256") if name in manifest["files"]})
        report.write_text(json.dumps(told), encoding="utf-8")
    text = json.dumps(manifest, indent=1) + "\n"
    (path / MANIFEST).write_text(text, encoding="utf-8")
    (path / MARKER).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n", encoding="utf-8")
    return taken


def _plain(name: str) -> str:
    """A name without its step."""
    return re.sub(r"\d{2,}", "#", name)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _largest(path: Path) -> Path:
    return max((path / name for name in _manifest(path)["files"]), key=lambda file: file.stat().st_size)
