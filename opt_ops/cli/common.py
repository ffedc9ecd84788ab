"""What all commands share: the configuration, the output options, confirmation, and completion from the journal."""

from __future__ import annotations

import getpass
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops import lineages
from opt_ops.config import Config, load
from opt_ops.core.events import KINDS, RequestRefused
from opt_ops.core.run import State
from opt_ops.errors import NotFound, OptOpsError, Refused
from opt_ops.files import read_json
from opt_ops.render import Column, Format, say, show

_ANSWER_SECONDS = 10.0  # a tick is a second


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
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
AuthorOption = Annotated[str, typer.Option("--author", help="Who asks, for the logbook.", show_default="your login")]


def author(given: str) -> str:
    """The name that the logbook gets."""
    return given or getpass.getuser()


def confirm(what: str, yes: bool) -> None:
    """Ask before the world changes; No unless it is said.

    Raises:
        Refused: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"not done without confirmation: {what}", "add --yes")
    if not typer.confirm(f"{what} Proceed?", default=False, err=True):
        raise Refused("not done")


def ask_daemon(path: Path, who: str, verb: str, arguments: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Put a request into the lineage's inbox and wait a moment until a living daemon has journaled it.

    Returns:
        What `-o json` prints of it: the request's id, the lineage, and whether it is journaled or waits for a daemon.

    Raises:
        Refused: the daemon journaled why it cannot be done.
    """
    request = lineages.ask(path, who, verb, arguments, time.time())
    answer = {"request": request.request, "lineage": path.name, "verb": verb, "status": "journaled"}
    alive = daemon_alive(settings.config.runs)
    deadline = time.monotonic() + (_ANSWER_SECONDS if alive else 0.0)
    while (path / "inbox" / f"{request.request}.json").exists():
        if time.monotonic() > deadline:
            say(f"the request waits in {path / 'inbox'} for a daemon", quiet)
            if not alive:
                say("  next: opt-ops daemon run", quiet)
            return answer | {"status": "waiting"}
        time.sleep(0.1)
    for entry in reversed(lineages.entries(path)):
        if isinstance(entry.event, RequestRefused) and entry.event.request == request.request:
            raise Refused(f"the daemon refused: {entry.event.why}")
    return answer


def show_answer(answer: Mapping[str, Any], form: Format) -> None:
    """Print what became of a request to programs; people have the exit code and the hint."""
    if form not in (Format.TABLE, Format.WIDE):
        show("opt-ops/request/1", [answer], [Column("REQUEST", "request")], form)


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
