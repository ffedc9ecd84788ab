"""`opt-ops trainer`: commands about a training command itself, before anything is trained with it."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.shared.options import FormatOption
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.errors import UsageError

app = typer.Typer(help="Check a training command.", no_args_is_help=True)

_OWN = ("steps", "checkpoint_every")
_USAGE = "opt-ops trainer check -- python train.py"


@app.callback()
def _trainer() -> None:
    """Check a training command."""


@app.command("check")
def check(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What starts one rank; after `--`.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="NAME", help="Passed to the trainer.")] = "check",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Passed to the trainer; may be given several times."),
    ] = None,
    ranks: Annotated[str, typer.Option("--ranks", help="Numbers of ranks to start it with.")] = "1,2",
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="By how much losses may differ that must be equal.")
    ] = 0.0,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep all that the attempts write in this folder.")
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Judge whether a trainer does what opt-ops relies on.

    It starts COMMAND some thirty times with the options that the supervisor would add, for some tens of steps each, in
    a scratch folder. Choose a tiny model. It judges by losses, not by what the trainer tells about itself.
    docs/trainer-check.md explains each promise and how to mend it.

    OK is yes, no, or - for what could not be judged. Exit codes: 0 no promise is broken, 1 some are, 2 usage.

    Examples:
      opt-ops trainer check -- python train.py
      opt-ops trainer check --recipe opt-tiny --set model.num_layers=1 -- python -m trainer
      opt-ops trainer check --ranks 1 --tolerance 1e-6 -o json -- python train.py --data /data/small
    """
    from opt_ops.trainer_check.check import check as judge

    counts = _ranks(ranks)
    for setting in settings or ():
        key, equals, _ = setting.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {setting} is not of the form KEY=VALUE", _USAGE)
        if key in _OWN:
            raise UsageError(f"--set {key}: the check sets it by itself", _USAGE)
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]}: no such command", _USAGE)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"--keep {keep}: it is no empty folder", "name a folder that does not exist yet")
    with _progress() as on_progress:
        found = judge(
            command,
            recipe=recipe,
            settings=settings or (),
            ranks=counts,
            tolerance=tolerance,
            keep=keep,
            on_progress=on_progress,
        )
    rows = [{"name": name, "ok": finding.ok, "why": finding.why} for name, finding in found.items()]
    columns = [Column("PROMISE", "name"), Column("OK", "ok"), Column("WHY", "why")]
    show("opt-ops/trainer-check/1", rows, columns, output)
    broken = [name for name, finding in found.items() if finding.ok is False]
    if broken:
        say(f"Broken: {', '.join(broken)}.\n  next: mend the first one; --keep DIR keeps the logs of all attempts")
        raise typer.Exit(1)


def _ranks(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= count <= 64 for count in counts):
        raise UsageError(f"--ranks {text}: expected numbers from 1 to 64, for example 1,2", _USAGE)
    return counts


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on stderr which attempt begins: on a terminal in one line that changes, else only that it takes a while."""
    if not sys.stderr.isatty():
        say("Checking the trainer: some thirty attempts …")
        yield lambda _: None
        return
    from rich.console import Console

    console, count = Console(stderr=True), 0
    with console.status("Checking the trainer …") as status:

        def told(name: str) -> None:
            nonlocal count
            count += 1
            status.update(f"Checking the trainer: attempt {count}, {name.replace('_', ' ')} …")

        yield told
