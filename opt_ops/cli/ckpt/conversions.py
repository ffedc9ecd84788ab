"""Checkpoints in Hugging Face's format, kept in the lineage's folder under the digest of the checkpoint.

The same bytes are converted once. A conversion is as large as the checkpoint's weights, and one that was interrupted
leaves its part: so the few that were used last stay, and what lies there unused is removed by the next command.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.trainer.questions import run_part
from opt_ops.config import TrainerCommand
from opt_ops.contract.files import open_append
from opt_ops.core.state.data import data_of
from opt_ops.errors import OptOpsError, Unavailable

FOLDER = "converted"
KEPT = 2  # that were used last, of each lineage

_in_use = ExitStack()
"""Holds the lock files of the conversions that this process has got, until it ends."""
atexit.register(_in_use.close)


def converted(chosen: Named, trainer: TrainerCommand, dtype: str, on_line: Callable[[str], None]) -> Path:
    """The checkpoint in Hugging Face's format, with its tokenizer. It stays until this process ends.

    Args:
        chosen: The checkpoint.
        trainer: The site's command: ours converts.
        dtype: fp32, fp16 or bf16.
        on_line: Gets each line about the progress.

    Raises:
        Unavailable: the site's trainer is another one, or cannot be started.
        OptOpsError: it could not be converted.
    """
    folder = chosen.lineage.path / FOLDER
    target = folder / f"{chosen.digest[:16]}-{dtype}"
    if not target.is_dir() and trainer.python is None:
        raise Unavailable(
            f"the trainer {' '.join(trainer.command)} has a format of its own: only checkpoints of `python -m trainer` "
            "are converted",
            "convert them with that trainer's own tools",
        )
    folder.mkdir(exist_ok=True)
    while True:
        with ExitStack() as kept:
            lock = kept.enter_context(open_append(_lock_of(target)))
            if not target.is_dir():
                if _try(lock) is False:
                    on_line("waiting for another command that converts it")
                elif not target.is_dir():
                    _convert(chosen, trainer, dtype, target, on_line)
            _wait(lock, fcntl.LOCK_SH)
            if target.is_dir():  # and not removed in between
                _in_use.enter_context(kept.pop_all())
                break
    os.utime(_lock_of(target))
    _remove_unused(folder, target)
    return target


def _convert(chosen: Named, trainer: TrainerCommand, dtype: str, target: Path, on_line: Callable[[str], None]) -> None:
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # of a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    state = chosen.lineage.state
    intent, run = state.intent, state.runs.get(chosen.checkpoint.run)
    first = data_of(state, run)[0].data if run else intent.data  # that the tokenizer was trained on
    words = [chosen.checkpoint.path, str(target), "--to", "hf", "--dtype", dtype]
    words += (
        ["--tokenizer", intent.tokenizer]
        if intent.tokenizer
        else [word for each in first or ("",) for word in ("--data", each)]
    )
    command = [*(trainer.python or ()), "-m", "trainer.convert", *words]
    code, said = run_part(trainer, command, on_line, subprocess.DEVNULL)
    if code:
        raise OptOpsError(f"{chosen.checkpoint.path} was not converted: {said or f'exit code {code}'}")


def _remove_unused(folder: Path, target: Path) -> None:
    """Remove all conversions but the last used, unless a process has got them; and what killed commands have left."""
    locks = sorted(folder.glob(".*.lock"), key=lambda path: path.stat().st_mtime, reverse=True)
    for number, path in enumerate(locks):
        other = folder / path.name[1 : -len(".lock")]
        if other == target:
            continue
        with open_append(path) as lock:
            if not _try(lock):  # somebody has got it, or nobody can tell
                continue
            for left in folder.glob(f".{other.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            if number >= KEPT:
                with suppress(FileNotFoundError):
                    unused = other.rename(folder / f".{other.name}.unused.tmp")  # no half of it is ever taken
                    shutil.rmtree(unused, ignore_errors=True)


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _try(lock: BinaryIO) -> bool | None:
    """Whether this process alone has it now; None: this file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _wait(lock: BinaryIO, how: int) -> None:
    with suppress(OSError):  # without locks, what two commands convert at once is converted twice
        fcntl.flock(lock, how)
