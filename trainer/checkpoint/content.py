"""Examine the content of a checkpoint: are its numbers a state of training? Correct bytes can hold wrong numbers."""

import contextlib
import hashlib
import io
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError, Manifest
from trainer.checkpoint.reader import CheckpointReader

_INDEX = ".metadata"


@dataclass(frozen=True, slots=True)
class Content:
    """The result of an examination.

    Attributes:
        manifest: of the checkpoint.
        tensors: number of tensors in it; None where another trainer wrote it in a format that is not read here.
        unchanged: names of tensors that are equal in the earlier save.
        before: step of the earlier save; None if there is none.
    """

    manifest: Manifest
    tensors: int | None
    unchanged: tuple[str, ...]
    before: int | None


def examine(path: Path) -> Content:
    """Verify the checkpoint ``path`` and read all of its tensors, part by part.

    All numbers must be finite. The optimizer must have made the same number of updates for all parameters. That number
    is at most the step, and more than in the earlier save. The weights must differ from those of the earlier save.

    Raises:
        CheckpointError: it is damaged, or its content is not a state of training.
    """
    found = manifest.verify(path)
    if _INDEX not in found.files:
        return Content(found, None, (), None)
    prints, updates = _read(path, found)
    if len(set(updates.values())) > 1:
        raise CheckpointError(path, f"parameters have different numbers of updates: {sorted(set(updates.values()))}")
    made = next(iter(updates.values()), None)
    if made is not None and made > found.step:
        raise CheckpointError(path, f"its step is {found.step}, but its optimizer has made {made:g} updates")
    before = _before(path, found.step)
    if before is None:
        return Content(found, len(prints), (), None)
    earlier, old_prints, old_updates = before
    unchanged = tuple(sorted(name for name in prints if prints[name] == old_prints.get(name)))
    weights = [name for name in prints if name.startswith("model.")]
    if not manifest.all_skipped(earlier, found):
        if weights and set(weights) <= set(unchanged):
            raise CheckpointError(path, f"stale: its weights are those of step {earlier.step}")
        if made is not None and made <= next(iter(old_updates.values()), -math.inf):
            raise CheckpointError(
                path, f"stale: its optimizer has made no more updates than that of step {earlier.step}"
            )
    return Content(found, len(prints), unchanged, earlier.step)


def _before(path: Path, step: int) -> tuple[Manifest, dict[str, str], dict[str, float]] | None:
    """The last earlier save that is good and readable from here, with its content as :func:`_read` returns it."""
    for _, other in reversed(manifest.earlier(path, step)):
        with contextlib.suppress(CheckpointError):
            found = manifest.verify(other)
            if _INDEX not in found.files:
                continue
            return found, *_read(other, found)
    return None


def _read(path: Path, found: Manifest) -> tuple[dict[str, str], dict[str, float]]:
    """A fingerprint of each tensor, and the number of updates of each parameter."""
    prints: dict[str, str] = {}
    updates: dict[str, float] = {}
    for name, tensor in _parts(path, found):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(path, f"{name} holds numbers that are not finite")
        if name.startswith("optimizer.") and name.endswith(".step"):
            updates[name] = float(tensor)
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        prints[name] = hashlib.sha256(prints.get(name, "").encode() + content).hexdigest()
    return prints, updates


def _parts(path: Path, found: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Each stored part of each tensor, in an order that depends on the layout alone."""
    located = {name: _locate(path, found, name) for name in found.files}  # only once: it reads the files of a snapshot
    metadata = CheckpointReader(located[_INDEX].parent).read_metadata()
    stored = metadata.storage_data.items()
    for index, place in sorted(stored, key=lambda item: (item[0].fqn, tuple(item[0].offset or ()))):
        name = os.fspath(place.relative_path)
        if name not in located:
            raise CheckpointError(path, f".metadata has {index.fqn} in {name}, which the manifest does not name")
        with located[name].open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        try:
            yield index.fqn, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(path, f"{index.fqn} in {name} cannot be read: {error}") from None


def _locate(path: Path, found: Manifest, name: str) -> Path:
    """The path of a file: in the checkpoint's folder, or on a disk of this host with a good copy."""
    if not found.nodes:
        return path / name
    for node in found.files[name]["nodes"]:
        place = found.nodes[node]
        folder = Path(place["folder"])
        if place["host"] == socket.gethostname() and not manifest.damage(folder, name, found):
            return folder / name
    holders = " or ".join(found.files[name]["nodes"])
    raise CheckpointError(path, f"{name} cannot be read from this host: run the command on {holders}")
