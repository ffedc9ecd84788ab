"""What all commands share: the configuration, the output options, and completion from the journal."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.output import Format
from opt_ops.config import Config, load
from opt_ops.core.events import KINDS
from opt_ops.core.state.model import State
from opt_ops.errors import NotFound, OptOpsError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import read_json


class Settings:
    """What every command is given; the configuration is read when a command first asks for it."""

    def __init__(self) -> None:
        self.config_path: Path | None = None
        self.debug = False

    @property
    def config(self) -> Config:
        """The site's configuration."""
        return load(self.config_path)


settings = Settings()


def complete_id(incomplete: str) -> list[str]:
    """Lineages and runs; attempts and incidents once their sign has been typed."""
    try:
        names = [path.name for path in lineages.folders(settings.config.runs)]
        states = [lineages.state(settings.config.runs / name) for name in names]
    except OptOpsError:
        return []
    known = [*names, *(run for state in states for run in state.runs)]
    if any(character in incomplete for character in "-i"):  # only who asks for more than a run gets them all
        known += [name for state in states for name in (*state.attempts, *state.incidents)]
    return [name for name in known if name.startswith(incomplete)]


def _states(context: typer.Context) -> list[State]:
    """Of the lineage that was named before, or of all; none where they cannot be read."""
    named = context.params.get("identifier")
    try:
        folders = [lineage_folder(str(named))] if named else lineages.folders(settings.config.runs)
        return [lineages.state(path) for path in folders]
    except OptOpsError:
        return []


def complete_step(context: typer.Context, incomplete: str) -> list[str]:
    """The steps of the checkpoints of the lineage that was named before."""
    steps = {known.checkpoint.step for state in _states(context) for known in state.checkpoints.values()}
    return [str(step) for step in sorted(steps) if str(step).startswith(incomplete)]


def complete_node(context: typer.Context, incomplete: str) -> list[str]:
    """The nodes that a journal names."""
    names = {name: None for state in _states(context) for name in (*state.nodes, *state.held)}
    return [name for name in names if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """The kinds of events."""
    return [kind for kind in sorted(KINDS) if kind.startswith(incomplete)]


IdArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="Lineage 12, run 12.01, attempt 12.01-a3 or incident 12-i003.", autocompletion=complete_id
    ),
]
OptionalIdArgument = Annotated[
    str,
    typer.Argument(metavar="[ID]", help="Lineage. [default: all of them]", autocompletion=complete_id),
]


def _use_config(file: Path | None) -> Path | None:
    settings.config_path = file or settings.config_path
    return file


def _use_debug(debug: bool) -> bool:
    settings.debug = debug or settings.debug
    return debug


# These two are understood before and behind every command. They are remembered as they are read, for completion too.
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        help="Configuration file. [default: $OPT_OPS_CONFIG or ./opt-ops.toml]",
        callback=_use_config,
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="With an error, show where in the code it arose.", callback=_use_debug)
]
FormatOption = Annotated[Format, typer.Option("-o", "--output", help="How to print.")]
HeaderOption = Annotated[bool, typer.Option("--header/--no-header", help="The table's heading line.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No remarks on stderr.")]


def daemon_alive(runs: Path) -> bool:
    """Whether a daemon has given a sign of life in the last half minute."""
    sign = read_json(runs / "daemon.json")
    return sign is not None and time.time() - sign["ts"] < 30


def lineage_folder(identifier: str) -> Path:
    """The folder of the lineage that an id belongs to."""
    return lineages.folder(settings.config.runs, identifier)


def newest_lineage() -> Path:
    """For commands whose ID may be left out.

    Raises:
        NotFound: there is none.
    """
    found = lineages.folders(settings.config.runs)
    if not found:
        raise NotFound(f"no lineages in {settings.config.runs}", "opt-ops run start opt-tiny")
    return found[-1]


def must_know(identifier: str, path: Path, state: State) -> None:
    """For commands that take more than a lineage.

    Raises:
        NotFound: the lineage has no such run, attempt, incident or entry.
    """
    entry = re.fullmatch(r"\d+-e(\d+)", identifier)
    known = identifier in (path.name, *state.runs, *state.attempts, *state.incidents)
    if not known and not (entry and int(entry[1]) <= state.seq):
        raise NotFound(f"lineage {path.name} has no {identifier}", f"opt-ops run show {path.name} lists what it has")
