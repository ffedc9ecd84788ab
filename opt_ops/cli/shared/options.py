"""What commands share: the configuration, the options, the lineage that an id names, completion from the journal."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from opt_ops.cli.shared.output import Format, say
from opt_ops.config import FILE, Config, load, locate
from opt_ops.core.events import KINDS
from opt_ops.core.names import lineage_of
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import parse_planned
from opt_ops.errors import NotFound, OptOpsError, UsageError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import Watch, look


class Settings:
    """The options before a command; the configuration is read when a command asks for it."""

    def __init__(self) -> None:
        self.config_path: Path | None = None
        self.debug = False

    @property
    def config(self) -> Config:
        """The site's configuration."""
        return load(self.config_path)


settings = Settings()


def complete_id(incomplete: str) -> list[str]:
    """Lineages and runs; after a typed `-` also attempts and incidents."""
    try:
        folders = lineages.folders(settings.config.runs)
        states = [lineages.state(path) for path in folders]
    except OptOpsError:
        return []
    known = [*(path.name for path in folders), *(run for state in states for run in state.runs)]
    if "-" in incomplete:  # there are many
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


def complete_attempt(context: typer.Context, incomplete: str) -> list[str]:
    """The attempts of the lineage that was named before."""
    names = [name for state in _states(context) for name in state.attempts]
    return [name for name in names if name.startswith(incomplete)]


def complete_node(context: typer.Context, incomplete: str) -> list[str]:
    """The nodes that a journal names."""
    names = {name: None for state in _states(context) for name in (*state.nodes, *state.held)}
    return [name for name in names if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """The kinds of events."""
    return [kind for kind in sorted(KINDS) if kind.startswith(incomplete)]


def _not_given() -> None:
    """The default of an ID: an empty ID is a mistake, and no omission."""


def _or_newest(context: typer.Context, given: str | None) -> str | None:
    return _or_default(context, given, changes=False)


def _or_default(context: typer.Context, given: str | None, changes: bool) -> str | None:
    if given is not None or context.resilient_parsing:
        return given
    return default_lineage(quiet=bool(context.params.get("quiet")), changes=changes)


def _or_only_one(context: typer.Context, given: str | None) -> str | None:
    return _or_default(context, given, changes=True)


_ID = "Lineage 12, run 12.01, attempt 12.01-a3 or incident 12-i003."


def _id(default: str, callback: Callable[..., str | None]) -> Any:
    return typer.Argument(
        metavar="ID",
        help=f"{_ID} [default: {default}]",
        default_factory=_not_given,
        show_default=False,
        callback=callback,
        autocompletion=complete_id,
    )


IdArgument = Annotated[str, _id("the newest that lives, else the newest", _or_newest)]
ChangedIdArgument = Annotated[str, _id("the only one that lives", _or_only_one)]
"""Of commands that change something: if several lineages live, they do not guess."""
OptionalIdArgument = Annotated[
    str,
    typer.Argument(metavar="ID", help="Lineage. [default: all of them]", autocompletion=complete_id),
]


def _use_config(file: Path | None) -> Path | None:
    settings.config_path = file or settings.config_path
    return file


def _use_debug(debug: bool) -> bool:
    settings.debug = debug or settings.debug
    return debug


# Every command accepts these two, before and after its name. They are stored while they are parsed, for completion too.
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        help="Configuration file. [default: $OPT_OPS_CONFIG or ./opt-ops.toml]",
        callback=_use_config,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.", callback=_use_debug)]
FormatOption = Annotated[Format, typer.Option("-o", "--output", help="Output format.")]
HeaderOption = Annotated[bool, typer.Option("--header/--no-header", help="Print the table's heading line.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print no remarks on stderr.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would happen; change nothing.")]
AuthorOption = Annotated[str, typer.Option("--author", help="Your name, for the logbook.", show_default="your login")]
PlannedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--planned",
        metavar="STEP[:WHAT]",
        help="Something changes on purpose from this step on, as data or batch. May be given several times.",
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the logbook.")]
WaitOption = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait",
        help="Wait until it is done, or do not wait. [default: until the daemon has accepted it, at most 10 s]",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """The options of every command that sends a request to the daemon: one field, one option."""

    yes: YesOption = False
    dry_run: DryRunOption = False
    wait: WaitOption = None
    output: FormatOption = Format.TABLE
    quiet: QuietOption = False
    author: AuthorOption = ""


def with_request_options(*omitted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that has a parameter `options: RequestOptions`: its fields become options of the command.

    Typer reads options from a function's signature only, so the signature is extended here.

    Args:
        omitted: Fields that the command does not offer; they keep their defaults.
    """
    hints = get_type_hints(RequestOptions, include_extras=True)
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(RequestOptions)
        if field.name not in omitted
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "options"]

        @wraps(command)
        def run(**given: Any) -> None:
            options = RequestOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            command(**given, options=options)

        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
        return run

    return decorate


@dataclass(frozen=True, slots=True)
class Lineage:
    """A lineage's folder and its state, replayed once for the whole command."""

    path: Path
    state: State

    @property
    def name(self) -> str:
        """Its number."""
        return self.path.name


def require_planned(given: Sequence[str] | None) -> list[str]:
    """The values of `--planned`.

    Raises:
        UsageError: one is not of the form STEP[:WHAT].
    """
    for each in given or ():
        try:
            parse_planned(each)
        except ValueError as error:
            raise UsageError(f"--planned {error}", "for example --planned 48000:stage-b") from error
    return list(given or ())


def require_settings(given: Sequence[str] | None) -> list[str]:
    """The values of `--set`.

    Raises:
        UsageError: one is not of the form KEY=VALUE.
    """
    for each in given or ():
        if not re.fullmatch(r"[\w.]+=.*", each):
            raise UsageError(f"--set {each}: not of the form key=value", "python -m trainer --list-recipes")
    return list(given or ())


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(option: str, text: str) -> float:
    """The value of an option that is a span, such as `90s`, `15m`, `2h`, `3d` or `1w`.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise UsageError(f"{option} {text}: not of the form 90s, 15m, 2h, 3d or 1w", f"for example {option} 2h")
    return float(found[1]) * _UNITS[found[2]]


def find_lineage(identifier: str) -> Lineage:
    """The lineage that an id belongs to.

    Raises:
        UsageError: `identifier` is no id.
        NotFound: there is no such lineage.
    """
    path = lineage_folder(identifier)
    return Lineage(path, lineages.state(path))


def watch_now() -> Watch:
    """Which daemons of the site live now."""
    return look(settings.config.runs, time.time())


def leave_if_unreadable(unreadable: Mapping[str, str]) -> None:
    """End a command that lists with exit code 5 if a lineage could not be read. The others were printed.

    Raises:
        Exit: there is one.
    """
    for name in unreadable:
        say(f"Lineage {name} cannot be read.\n  next: opt-ops run show {name}")
    if unreadable:
        raise typer.Exit(5)


def daemon_alive(runs: Path) -> bool:
    """Whether a daemon of this runs folder lives: by its lock on its own host, else by its liveness file."""
    return bool(look(runs, time.time()).living)


def lineage_folder(identifier: str) -> Path:
    """The folder of the lineage that an id belongs to.

    Raises:
        UsageError: `identifier` is no id.
        NotFound: there is no such lineage.
    """
    return lineages.folder(settings.config.runs, identifier)


def no_lineage() -> NotFound:
    """The error of a command that needs a lineage where there is none."""
    if nowhere := no_site():
        return NotFound(nowhere, NO_SITE_HINT)
    return NotFound(f"there is no lineage in {settings.config.runs}", "opt-ops run start opt-tiny")


NO_SITE_HINT = "opt-ops init, or opt-ops -c FILE"


def no_site() -> str:
    """Why this folder is no site: it has no configuration, and no runs folder either. Empty if it is one."""
    runs = settings.config.runs
    if locate(settings.config_path) is not None or runs.exists():
        return ""
    return f"no {FILE} in {Path.cwd()} and $OPT_OPS_CONFIG is not set: looked into {runs}, which is not there"


def site_lineages() -> list[Path]:
    """The folders of all lineages, for commands that list them.

    Raises:
        NotFound: there is neither a configuration nor a runs folder here.
    """
    if nowhere := no_site():
        raise NotFound(nowhere, NO_SITE_HINT)
    return lineages.folders(settings.config.runs)


def default_lineage(*, quiet: bool = False, changes: bool = False) -> str:
    """The lineage that a command means when its ID is omitted: the newest that lives, else the newest.

    It is named on stderr. A lineage that cannot be read counts as one that does not live.

    Args:
        quiet: Do not name it.
        changes: The command changes something, so it must not guess among several that live.

    Raises:
        NotFound: there is none.
        UsageError: several live, and the command changes something.
    """
    found = lineages.folders(settings.config.runs)
    if not found:
        raise no_lineage()
    living: list[str] = []
    for path in reversed(found):
        with suppress(OptOpsError):
            living += [] if lineages.state(path).ended else [path.name]
        if living and not changes:
            break
    if len(living) > 1:
        names = f"{', '.join(living[:0:-1])} and {living[0]}"
        raise UsageError(f"{'two' if len(living) == 2 else len(living)} live: {names}; name one", "opt-ops q")
    name = (living or [found[-1].name])[0]
    say(f"lineage {name}", quiet)
    return name


def split_id(identifier: str, after: str | None, example: str, *, quiet: bool = False) -> tuple[str, str]:
    """The ID and the argument after it. If one argument is given, it is the latter.

    Args:
        identifier: The first argument.
        after: The second one, if it was given.
        example: The command with both, for the error.
        quiet: Do not name the lineage on stderr.

    Raises:
        UsageError: only an ID was given, or several lineages live.
    """
    if after is not None:
        return identifier, after
    try:
        lineage_of(identifier)
    except ValueError:
        return default_lineage(quiet=quiet, changes=True), identifier
    raise UsageError(f"nothing follows the ID {identifier}", f"for example {example}")


def require_known(identifier: str, lineage: Lineage) -> None:
    """Check an id that names more than a lineage.

    Raises:
        NotFound: the lineage has no such run, attempt, incident or journal entry.
    """
    state = lineage.state
    entry = re.fullmatch(r"\d+-e(\d+)", identifier)
    known = identifier in (lineage.name, *state.runs, *state.attempts, *state.incidents)
    if not known and not (entry and int(entry[1]) <= state.seq):
        raise NotFound(f"lineage {lineage.name} has no {identifier}", f"opt-ops run show {lineage.name}")
