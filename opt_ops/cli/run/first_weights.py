"""The checkpoint of `run start --init-from`: whose weights training begins with."""

from __future__ import annotations

import shlex
from pathlib import Path

from opt_ops.contract import manifest
from opt_ops.core.text import printable
from opt_ops.errors import UsageError


def require_checkpoint(path: Path | None) -> str | None:
    """The absolute path of a complete checkpoint. Its shards are verified when the trainer reads them.

    Raises:
        UsageError: there is none at the path.
    """
    if path is None:
        return None
    convert = (
        f"for weights of Hugging Face or metaseq: python -m trainer.convert {shlex.quote(str(path))} DST --to native"
    )
    if not path.exists():
        raise UsageError(
            f"--init-from {path} does not exist", "opt-ops ckpt list ID -o wide names the folders of checkpoints"
        )
    if not (path / manifest.MARKER).is_file():
        inside = manifest.committed(path) if path.is_dir() else []
        hint = f"name one of its checkpoints, for example {inside[-1][1]}" if inside else convert
        raise UsageError(f"--init-from {path} is no checkpoint: it has no file {manifest.MARKER}", hint)
    try:
        manifest.read(path)
    except manifest.CheckpointError as error:
        raise UsageError(printable(f"--init-from {error}"), "opt-ops ckpt list ID -o wide names others") from error
    return str(path.absolute())


def keep(path: Path) -> str:
    """Protect the checkpoint from being thinned out: a rollback to step 0 needs it again.

    Returns:
        Why it cannot be protected; empty if it is, or if nobody thins out its folder.
    """
    if all(path != each for _, each in manifest.committed(path.parent)):
        return ""
    try:
        manifest.pin(path)
    except OSError as error:
        return f"{path} may be thinned out, and a rollback to step 0 needs it: {error.strerror}"
    return ""
