"""The command `opt-ops`. Each module holds one noun; what the command line does not name is not even imported."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main

from opt_ops import __version__
from opt_ops.cli.options import ConfigOption, DebugOption, settings
from opt_ops.errors import OptOpsError

# By noun: the module whose `app` (or other attribute) it is, and the modules that add commands to that.
_NOUNS = {
    "run": ("run", "app", ("run_start", "run_control", "run_watch")),
    "ckpt": ("ckpt", "app", ()),
    "node": ("node", "app", ("node_check", "node_ledger", "run_control")),
    "logbook": ("logbook", "logbook", ()),
    "mlflow": ("logbook", "mlflow", ()),
    "daemon": ("daemon", "daemon", ()),
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
_COMPLETE = "_OPT_OPS_COMPLETE"  # set by the shell's completion, to a word that names the shell
_NEED_ALL = frozenset({"-h", "--help", "--install-completion", "--show-completion"})


def build(noun: str = "", verb: str = "") -> typer.Typer:
    """The command with all its nouns and verbs, or with one of them, or with one verb of one noun."""
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
        if noun in ("", name):
            app.add_typer(_noun(getattr(_module(module), attribute), more, verb), name=name)
    for name, (module, attribute) in _VERBS.items():
        if noun in ("", name):
            app.command(name)(getattr(_module(module), attribute))
    return app


def _noun(app: typer.Typer, more: Sequence[str], verb: str) -> typer.Typer:
    """With its one command that is called `verb`; with all of them, if that is none or another module adds it."""
    for name in ("", *more):
        if name:
            _module(name)
        found = [known for known in app.registered_commands if verb and _name(known) == verb]
        if found:
            alone = copy.copy(app)
            alone.registered_commands = found
            return alone
    return app


def _name(command: Any) -> str:
    return command.name or typer.main.get_command_name(command.callback.__name__)


def _module(name: str) -> Any:
    return importlib.import_module(f"opt_ops.cli.{name}")


def _root(
    context: typer.Context,
    config: ConfigOption = None,
    debug: DebugOption = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        _module("run").queue()


def main() -> None:
    """Run the command; whatever goes wrong is a message and an exit code, a traceback only with `--debug`."""
    try:
        command = typer.main.get_command(build(*_asked()))
        _understand_everywhere(command, [each for each in command.params if each.name in ("config", "debug")])
        command.main(prog_name="opt-ops", complete_var=_COMPLETE)
    except OptOpsError as error:
        _leave(str(error), error.hint, error.exit_code)
    except OSError as error:  # of this machine: a folder that cannot be written, a disk that is full
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _leave(what, "opt-ops doctor says what is wrong with this site", 1)
    except Exception as error:  # noqa: BLE001  (a mistake of ours: at three in the morning a line says more than a page)
        hint = "" if settings.debug else "the same command with --debug says where; please report it"
        _leave(f"unexpected {type(error).__name__}: {error}", hint, 1)


def _leave(message: str, hint: str, code: int) -> None:
    if settings.debug:
        traceback.print_exc()
    print(f"opt-ops: {message}", file=sys.stderr)
    if hint:
        print(f"  next: {hint}", file=sys.stderr)
    sys.exit(code)


def _understand_everywhere(command: Any, options: Sequence[Any]) -> None:
    """Let `-c` and `--debug` stand behind every command too, and not only before it."""
    for child in getattr(command, "commands", {}).values():
        for option in () if hasattr(child, "commands") else options:
            common = copy.copy(option)
            common.expose_value = False
            child.params.append(common)
        _understand_everywhere(child, options)


def _asked() -> tuple[str, str]:
    """Noun and verb of the command line, as far as they are known before anything is imported; "" stands for all."""
    words = sys.argv[1:]
    if _COMPLETE in os.environ:  # the last word is not finished yet
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        words = line.split()[1:] if line[-1:].isspace() else line.split()[1:-1]
    elif not _NEED_ALL.intersection(words) and not any(_plain(words)):
        return "q", ""  # alone, it prints the queue
    noun, verb, *_ = *_plain(words), "", ""
    return (noun, verb) if noun in _NOUNS or noun in _VERBS else ("", "")


def _plain(words: Sequence[str]) -> list[str]:
    """Those that are neither options nor the value of `-c`."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in ("-c", "--config")]


def __getattr__(name: str) -> Any:
    """`app`: the whole command, for those who look at all of it."""
    if name != "app":
        raise AttributeError(name)
    return build()
