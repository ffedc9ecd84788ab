"""The command `opt-ops`. Each module holds one noun; what the command line does not name is not even imported."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer

from opt_ops import __version__
from opt_ops.cli.common import ConfigOption, settings
from opt_ops.errors import OptOpsError

# By noun: the module whose `app` (or other attribute) it is, and the modules that add commands to that.
_NOUNS = {
    "run": ("run", "app", ("steer", "live")),
    "ckpt": ("ckpt", "app", ()),
    "node": ("node", "app", ("check", "parts", "steer")),
    "logbook": ("chronicle", "logbook", ()),
    "mlflow": ("chronicle", "mlflow", ()),
    "daemon": ("service", "daemon", ()),
    "drill": ("drill", "app", ()),
    "alerts": ("alerts", "app", ()),
    "signals": ("signals", "app", ()),
    "playbook": ("playbook", "app", ()),
}
_VERBS = {
    "q": ("run", "queue"),
    "events": ("run", "events"),
    "ledger": ("ledger", "ledger"),
    "replay": ("replay", "replay"),
    "init": ("init", "init"),
    "doctor": ("doctor", "doctor"),
}


def build(only: str = "") -> typer.Typer:
    """The command with all its nouns and verbs, or with one of them."""
    app = typer.Typer(
        name="opt-ops",
        help="Supervises training runs: sees what goes wrong, recovers by playbooks, proves it, writes the logbook.",
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_root)
    for name, (module, attribute, more) in _NOUNS.items():
        if only in ("", name):
            noun = getattr(_module(module), attribute)
            for each in more:
                _module(each)
            app.add_typer(noun, name=name)
    for name, (module, attribute) in _VERBS.items():
        if only in ("", name):
            app.command(name)(getattr(_module(module), attribute))
    return app


def _module(name: str) -> Any:
    return importlib.import_module(f"opt_ops.cli.{name}")


def _root(
    context: typer.Context,
    config: ConfigOption = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    settings.config_path = config
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        _module("run").queue()


def main() -> None:
    """Run the command; a mistake of the user's or the world's is a message and an exit code, never a traceback."""
    word = sys.argv[1] if len(sys.argv) > 1 else "q"  # alone, it prints the queue
    first = word if word in _NOUNS or word in _VERBS else "q" if word == "--version" else ""
    try:
        build(first)()
    except OptOpsError as error:
        print(f"opt-ops: {error}", file=sys.stderr)
        if error.hint:
            print(f"  next: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


def __getattr__(name: str) -> Any:
    """`app`: the whole command, for those who look at all of it."""
    if name != "app":
        raise AttributeError(name)
    return build()
