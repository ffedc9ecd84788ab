"""Read a checkpoint's manifest and compare it with the files."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opt_ops.contract.checkpoint.folders import (
    CheckpointError,
    about_link,
    link_on_the_way,
    shards_in,
    shown,
    step_in_name,
)
from opt_ops.contract.checkpoint.manifest_file import Manifest, read_manifest
from opt_ops.contract.checkpoint.staleness import stale
from opt_ops.contract.files import sha256


def verify(path: Path) -> Manifest:
    """Read every byte of the checkpoint ``path`` and compare it with the manifest.

    A snapshot needs one good copy of each file. Files that only other hosts hold cannot be read from here. Each node
    has read its files back before the snapshot was committed. It reads them again before training resumes.

    Raises:
        CheckpointError: the checkpoint is missing, torn, damaged or stale. ``why`` names the file and the damage.
        OSError: a folder, the manifest or the marker cannot be read.
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
        CheckpointError: there is no checkpoint, or it is torn, misnamed or stale, or it holds a symbolic link or a file
            that its manifest does not name. Empty subfolders are no damage.
        OSError: a folder, the manifest or the marker cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(path, "no such folder")
    manifest = read_manifest(path)
    present = require_consistent(path, manifest)
    if not manifest.nodes and (absent := sorted(manifest.files.keys() - present)):
        raise CheckpointError(path, f"{shown(absent[0])} is missing")
    return manifest


def require_consistent(path: Path, manifest: Manifest) -> set[str]:
    """Refuse a manifest that does not fit its folder. Returns the files that are in the folder.

    Raises:
        CheckpointError: steps contradict each other, there is a file that the manifest does not name, or a symbolic
            link, or the save is stale.
        OSError: a folder cannot be read.
    """
    step = step_in_name(path)
    if step is not None and step != manifest.step:
        raise CheckpointError(path, f"the folder says step {step}, its manifest step {manifest.step}")
    trained = manifest.telemetry.get("num_updates", manifest.step)
    if trained != manifest.step:
        raise CheckpointError(path, f"the manifest says step {manifest.step}, its telemetry step {trained}")
    present = shards_in(path)
    named = set() if manifest.nodes else set(manifest.files)
    if extra := sorted(present - named):
        raise CheckpointError(path, f"unexpected file {shown(extra[0])}: the manifest does not name it")
    if why := stale(path, manifest):
        raise CheckpointError(path, why)
    return present


def damage(folder: Path, name: str, manifest: Manifest) -> str:
    """What is wrong with the file ``name`` in ``folder``. Empty if the file is as the manifest says."""
    expected, what = manifest.files[name], shown(name)
    if link := link_on_the_way(folder, name):
        return about_link(folder, link)
    try:
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            return f"{what} has {size} bytes, the manifest says {expected['size']}"
        if sha256(folder / name) != expected["sha256"]:
            return f"the content of {what} has changed since it was written (SHA-256 differs)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{what} is missing" + (f" in {folder}" if manifest.nodes else "")
    except OSError as error:
        return f"{what} cannot be read: {error}"
    return ""
