"""A checkpoint that a command names, such as `12/61000`, and its conversion to Hugging Face's format.

The conversion is kept in the lineage's folder, under the digest of the checkpoint: the same bytes are converted once,
as long as it is one of those that were used last.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from opt_ops.cli.options import Lineage, find_lineage
from opt_ops.cli.output import say
from opt_ops.cli.trainer_questions import run_part
from opt_ops.config import TrainerCommand
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.manifest import digest
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.queries import counting
from opt_ops.core.values import Checkpoint
from opt_ops.errors import NotFound, OptOpsError, Unavailable, UsageError
from opt_ops.runfolder.checkpoints import problem
from opt_ops.runfolder.files import read_json

_NAMED = re.compile(r"(?P<id>\d+(?:\.\d{2,})?)(?:/(?P<step>\d+))?")
FOLDER = "converted"
KEPT = 2
"""Conversions of a lineage that stay beside a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A checkpoint that a command names."""

    lineage: Lineage
    checkpoint: Checkpoint
    counts: bool  # whether its steps are part of the present weights

    @property
    def digest(self) -> str:
        """SHA-256 of its manifest, which has those of all its files."""
        return digest(Path(self.checkpoint.path))

    @property
    def config(self) -> Mapping[str, Any] | None:
        """config.json of the newest attempt of its run; None if there is none."""
        attempts = [each for each in self.lineage.state.attempts.values() if each.run == self.checkpoint.run]
        files = (self.lineage.path / attempt_folder(each.name) / "config.json" for each in reversed(attempts))
        return next((found for file in files if isinstance(found := read_json(file), dict)), None)


def named(text: str) -> Named:
    """The checkpoint `12/61000` that counts, that of a run `12.01/61000`, or without a step the newest that counts.

    Raises:
        UsageError: the text names none.
        NotFound: there is no such lineage or checkpoint.
    """
    found = _NAMED.fullmatch(text)
    if found is None:
        raise UsageError(f"{text}: a lineage or a run and a step are wanted, such as 12/61000 or 12.01/61000")
    lineage = find_lineage(found["id"])
    state, step = lineage.state, found["step"]
    ours = [known for known in state.checkpoints.values() if not known.checkpoint.nodes]  # durable ones
    reachable = counting(state)
    counts = [known for known in ours if known.checkpoint.path in reachable]
    chosen = [known for known in ours if known.checkpoint.run == found["id"]] if "." in found["id"] else counts
    chosen = [known for known in chosen if step is None or known.checkpoint.step == int(step)]
    if step is None:
        chosen = [known for known in chosen if known.good] or chosen
    if not chosen:
        raise NotFound(
            f"{found['id']} has no checkpoint{f' of step {step}' if step else ''}", f"opt-ops ckpt list {lineage.name}"
        )
    newest = max(chosen, key=lambda known: known.checkpoint.step).checkpoint
    return Named(lineage=lineage, checkpoint=newest, counts=newest.path in reachable)


def require_sound(chosen: Named) -> None:
    """Compare every byte with the manifest.

    Raises:
        Exit: 65, the checkpoint is damaged. The reason is printed.
    """
    why = problem(chosen.checkpoint)
    if why:
        say(f"The checkpoint of step {chosen.checkpoint.step} is damaged: {why}")
        say(f"  next: opt-ops ckpt list {chosen.lineage.name}")
        raise typer.Exit(ExitCode.CHECKPOINT_REFUSED)


def converted(chosen: Named, trainer: TrainerCommand, dtype: str, on_line: Callable[[str], None]) -> Path:
    """The checkpoint in Hugging Face's format, with its tokenizer.

    Args:
        chosen: The checkpoint.
        trainer: The site's command: ours converts.
        dtype: fp32, fp16 or bf16.
        on_line: Gets each line about the progress.

    Raises:
        Unavailable: the site's trainer is another one, or cannot be started.
        OptOpsError: it could not be converted.
    """
    target = chosen.lineage.path / FOLDER / f"{chosen.digest[:16]}-{dtype}"
    if _use(target):
        return target
    if trainer.python is None:
        raise Unavailable(
            f"the trainer {' '.join(trainer.command)} has a format of its own: only checkpoints of `python -m trainer` "
            "are converted",
            "convert them with that trainer's own tools",
        )
    intent = chosen.lineage.state.intent
    words = [chosen.checkpoint.path, str(target), "--to", "hf", "--dtype", dtype]
    words += (
        ["--tokenizer", intent.tokenizer]
        if intent.tokenizer
        else [word for each in intent.data or ("",) for word in ("--data", each)]
    )
    target.parent.mkdir(exist_ok=True)
    _remove_unused(target.parent)
    code, said = run_part(trainer, [*trainer.python, "-m", "trainer.convert", *words], on_line, subprocess.DEVNULL)
    if not _use(target):  # with another code than 0 it may be there, too: another command was faster
        raise OptOpsError(f"{chosen.checkpoint.path} was not converted: {said or f'exit code {code}'}")
    return target


_in_use: list[int] = []  # descriptors: the kernel releases their locks with this process


def _use(folder: Path) -> bool:
    """Whether a conversion is there. If so, it is in use until this process ends: no other command removes it."""
    try:
        _in_use.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        return False
    with suppress(OSError):  # a file system without locks, or another user's folder
        fcntl.flock(_in_use[-1], fcntl.LOCK_SH)
        os.utime(_in_use[-1])
    return folder.is_dir()  # it may have been removed before this process had the lock


def _remove_unused(folder: Path) -> None:
    """Keep the conversions that were used last. One of a large model is as large as its checkpoint's weights."""
    known = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(known, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        with suppress(OSError):  # in use, or another command removes it
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
