"""Save a checkpoint that one rank writes whole; and the parts of that, for several ranks that write."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_ops.contract import manifest
from opt_ops.contract.errors import UserError
from opt_ops.contract.fence import SupersededError
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside


def save_alone(
    options: Options,
    outside: Outside,
    line: Mapping[str, Any],
    state: Mapping[str, str | bytes],
    *,
    world: int,
) -> bool:
    """Save a checkpoint that rank 0 writes whole. The other ranks go on, and wait in their next reduction.

    Args:
        options: of this process.
        outside: what this rank hears.
        line: what :meth:`opt_ops.contract.run_folder.RunFolder.telemetry` returned for the update.
        state: by name, the content of each file. Training changes all of them with every update.
        world: number of ranks.

    Returns:
        Whether it was committed. If not, there is a newer attempt. All ranks hear of it in the next update, and leave
        together: if this rank left here, the others would end with another exit code.

    Raises:
        CheckpointError: the state is that of the save before, or a file cannot be a part of a checkpoint.
        OSError: a file cannot be written or synced.
    """
    try:
        path = begin_save(options, outside, line["num_updates"])
        for name, content in state.items():
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        manifest.write_rank(path, 0, state, state=state)
        header = header_of(options, line, {"world": world})
        manifest.commit(path, ranks=1, deadline_seconds=0.0, header=header, before_marker=outside.check_fence)
    except SupersededError:
        return False
    return True


def begin_save(options: Options, outside: Outside, step: int) -> Path:
    """Make an empty folder for the checkpoint of ``step``. Rank 0 calls it, before any rank writes into the folder.

    What an earlier attempt has left of the same step is removed, but only after a look at the fence.

    Returns:
        The folder.

    Raises:
        SupersededError: a newer attempt exists. Its checkpoints must stay.
        UserError: there is no ``--checkpoint-dir``.
        OSError: the folder cannot be removed or made.
    """
    if options.checkpoint_dir is None:
        raise UserError("--checkpoint-dir is missing: the folder for the checkpoints of this run.")
    path = manifest.step_folder(options.checkpoint_dir, step)
    outside.check_fence()
    if path.exists():
        manifest.remove(path)
    path.mkdir(parents=True)
    return path


def header_of(options: Options, line: Mapping[str, Any], layout: Mapping[str, int], **others: Any) -> dict[str, Any]:
    """The header for :func:`opt_ops.contract.manifest.commit`, from the line of telemetry of the update.

    Args:
        options: of this process.
        line: what :meth:`opt_ops.contract.run_folder.RunFolder.telemetry` returned.
        layout: numbers of ranks, with ``world``.
        others: other fields of the manifest.
    """
    return {
        "step": line["num_updates"],
        "attempt": options.attempt,
        "ts": time.time(),
        "layout": dict(layout),
        "data_position": line["data_position"],
        "tokens": line["tokens"],
        "settings_digest": "",
        "lr_factors": [list(pair) for pair in options.lr_factors],
        "skips": [list(pair) for pair in options.skips],
        "telemetry": dict(line),
    } | others
