"""Find a save that holds the state of an earlier save.

Such a save happens when state was not copied, or was copied too early. Its bytes are whole, so no hash shows it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_ops.contract.checkpoint.folders import CheckpointError, earlier, shown
from opt_ops.contract.checkpoint.manifest_file import Manifest, read_manifest

_SHARD = ".distcp"  # the ending of torch.distributed.checkpoint's shards


def all_skipped(before: Manifest, after: Manifest) -> bool:
    """Whether every update between two saves was skipped. Then both hold the same state."""
    skipped = after.telemetry.get("skipped", 0) - before.telemetry.get("skipped", 0)
    return skipped >= after.step - before.step


def stale(path: Path, manifest: Manifest) -> str:
    """What is stale in the checkpoint ``path``. Empty: nothing is, or there is no readable save before it."""
    found = _save_before(path, manifest.step)
    if found is None:
        return ""
    last, before = found
    if all_skipped(before, manifest):
        return ""
    known = {file["sha256"]: name for name, file in _state_before(before, manifest).items()}
    for name, file in sorted(_state(manifest).items()):
        if (other := known.get(file["sha256"])) is not None:
            same = "" if other == name else f" {shown(other)}"
            steps = manifest.step - before.step
            return f"stale: {shown(name)} holds the same as{same} in {last.name}, {steps} steps before"
    return ""


def _save_before(path: Path, step: int) -> tuple[Path, Manifest] | None:
    for _, last in reversed(earlier(path, step)):
        try:
            return last, read_manifest(last)
        except (CheckpointError, OSError):
            continue  # it is damaged or was just removed; that says nothing about this save
    return None


def _state(manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """The files that every applied update changes.

    They are marked. In a save without marks they are the shards, but not those that are much smaller than the largest:
    a rank may hold only empty parts.
    """
    if _has_marks(manifest):
        return {name: file for name, file in manifest.files.items() if file.get("state")}
    shards = _shards(manifest)
    large = max((file["size"] for file in shards.values()), default=0) / 10
    return {name: file for name, file in shards.items() if file["size"] >= large}


def _state_before(before: Manifest, after: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """The files of the save before with which those of :func:`_state` are compared.

    If only the later save has marks, any file of the earlier one may have been state: it did not say.
    """
    if not _has_marks(after):
        return _shards(before)
    if not _has_marks(before):
        return before.files
    return {name: file for name, file in before.files.items() if file.get("state")}


def _has_marks(manifest: Manifest) -> bool:
    return any("state" in file for file in manifest.files.values())


def _shards(manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    return {name: file for name, file in manifest.files.items() if name.endswith(_SHARD)}
