"""The command `opt-ops`. Each package or module holds one noun; only those that the command line needs are imported."""

from __future__ import annotations

import copy
import importlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main

from opt_ops import __version__
from opt_ops.cli.shared.help import HelpContext, TopLevel, for_alias
from opt_ops.cli.shared.mistakes import for_programs, is_usage_error, say_error, usage_error, with_command
from opt_ops.cli.shared.options import ConfigOption, DebugOption, settings
from opt_ops.cli.shared.output import say
from opt_ops.cli.shared.streams import READER_LEFT, flush_streams, prepare_streams
from opt_ops.errors import OptOpsError, UsageError

# Noun → the module that holds it, its attribute there, and the modules that add commands to it.
_NOUNS = {
    "run": (
        "run.commands",
        "app",
        ("run.start", "run.fork", "run.control", "run.asking", "run.watch", "run.watch_job", "run.forecast"),
    ),
    "ckpt": ("ckpt.commands", "app", ()),
    "node": ("node.commands", "app", ()),
    "logbook": ("logbook.commands", "logbook", ()),
    "mlflow": ("logbook.commands", "mlflow", ()),
    "daemon": ("daemon.commands", "daemon", ()),
    "drill": ("drill", "app", ()),
    "alerts": ("alerts", "app", ()),
    "signals": ("signals", "app", ()),
    "data": ("data", "app", ()),
    "playbook": ("playbook", "app", ()),
    "trainer": ("trainer.commands", "app", ()),
    "campaign": ("campaign.commands", "app", ("campaign.read",)),
}
_VERBS = {
    "q": ("queue", "queue"),
    "events": ("run.commands", "events"),
    "compare": ("compare", "compare"),
    "ledger": ("ledger.commands", "ledger"),
    "replay": ("replay", "replay"),
    "init": ("init", "init"),
    "doctor": ("doctor", "doctor"),
    "glossary": ("glossary", "glossary"),
    "why": ("why", "why"),
    "pending": ("pending", "pending"),
}
# Short spellings of commands of `opt-ops run` → the module and the function.
_EVERY_DAY = {
    "watch": ("run.watch", "watch"),
    "explain": ("run.commands", "explain"),
    "logs": ("run.watch", "logs"),
    "note": ("run.control", "note"),
}
_COMPLETE = "_OPT_OPS_COMPLETE"  # the shell's completion sets it to the name of the shell
_UNICODE_HINT = "give it in the encoding of this locale, or set LC_ALL=C.UTF-8"
_NEED_ALL = frozenset({"-h", "--help", "--install-completion", "--show-completion"})


def build(noun: str = "", verb: str = "") -> typer.Typer:
    """The command with all nouns and verbs; with a noun, only that one; with a verb too, only that one command."""
    app = typer.Typer(
        name="opt-ops",
        cls=TopLevel,
        help="Supervise training runs: detect faults, recover by playbooks, prove the recovery, write the logbook.",
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
    for name, (module, attribute) in _EVERY_DAY.items():
        if noun in ("", name):
            command = getattr(_module(module), attribute)
            app.command(name, help=for_alias(command, "run", name))(command)
    return app


def _noun(app: typer.Typer, more: Sequence[str], verb: str) -> typer.Typer:
    """The noun with its one command `verb`; with all commands if there is no verb, or no such command."""
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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        _module("queue").queue()


def main() -> None:
    """Run the command. Every error is a message and an exit code; `--debug` adds the traceback."""
    prepare_streams()
    try:
        code = _run()
    except KeyboardInterrupt:  # while the modules of the command were imported
        code = 130
    except BrokenPipeError:
        code = READER_LEFT
    sys.exit(flush_streams() or code)


def _run() -> int:
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, commands may clean up
        _require_unicode(sys.argv[1:])
        command = adapted(build(*_named_command()))
        code = command.main(prog_name="opt-ops", complete_var=_COMPLETE, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # Typer's answer to it is 1
            return READER_LEFT
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except OptOpsError as error:
        return _fail(str(error), error.hint, error.exit_code)
    except UnicodeEncodeError as error:  # a name of a file, a login: what the journal and the logbook cannot hold
        return _fail(f"{ascii(error.object)[:200]} is no Unicode text in this locale", _UNICODE_HINT, 2)
    except BrokenPipeError:
        raise
    except OSError as error:  # for example a folder that cannot be written, or a full disk
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(what, "opt-ops doctor checks this site", 1)
    except typer.Abort:
        return _fail("not done: you did not answer", "", 1)
    except Exception as error:  # noqa: BLE001  (a bug of ours: one line, since a traceback hides the message)
        if is_usage_error(error):
            return _wrong_usage(error)
        hint = "" if settings.debug else "run it again with --debug, and report the traceback"
        return _fail(f"unexpected {type(error).__name__}: {error}", hint, 1)


def _wrong_usage(error: Any) -> int:
    said, hint = usage_error(error)
    if said.startswith("Usage: "):  # a noun without its verb gets the help
        say(said)
        return 2
    return _fail(said, hint, 2)


def _require_unicode(words: Sequence[str]) -> None:
    """Refuse what is no text: the journal, the logbook and alerts hold Unicode only.

    Raises:
        UsageError: an argument holds bytes that are no text in the encoding of this locale.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(
                f"the argument {ascii(word)[:200]} is no text in {sys.getfilesystemencoding()}", _UNICODE_HINT
            )


def _fail(message: str, hint: str, code: int) -> int:
    if settings.debug:
        traceback.print_exc()
    hint = with_command(hint, code, _typed())
    say_error(message, hint, code, programs=for_programs(sys.argv[1:]))
    return code


def adapted(app: typer.Typer) -> Any:
    """The command of an app, as people meet it: with options and help of its own."""
    command = typer.main.get_command(app)
    _adapt(command, [each for each in command.params if each.name in ("config", "debug")])
    return command


def _adapt(command: Any, options: Sequence[Any]) -> None:
    """Accept `-c` and `--debug` after every command too, and lay out its help."""
    command.context_class = HelpContext
    for parameter in command.params:
        if "[default:" in (getattr(parameter, "help", None) or ""):
            parameter.show_default = False  # the text says it
    for child in getattr(command, "commands", {}).values():
        _adapt(child, options)
        if hasattr(child, "commands"):
            continue
        for option in options:
            common = copy.copy(option)
            common.expose_value = False
            child.params.append(common)
        for parameter in child.params:
            _require_finite(parameter)


def _require_finite(parameter: Any) -> None:
    """Refuse inf and nan in every option: no number of a command means anything without an end."""
    own = parameter.callback

    def check(context: Any, option: Any, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            name = option.opts[0] if option.param_type_name == "option" else option.name
            raise UsageError(f"{name} {value}: not a finite number", f"{context.command_path} -h")
        return own(context, option, value) if own else value

    parameter.callback = check


def _named_command() -> tuple[str, str]:
    """Noun and verb of the command line, before anything is imported. "" means all of them."""
    words = sys.argv[1:]
    if _COMPLETE in os.environ:  # the last word is not finished yet
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        words = line.split()[1:] if line[-1:].isspace() else line.split()[1:-1]
    elif not _NEED_ALL.intersection(words) and not any(_plain(words)):
        return "q", ""  # `opt-ops` alone prints the queue
    noun, verb, *_ = *_plain(words), "", ""
    return (noun, verb) if noun in {*_NOUNS, *_VERBS, *_EVERY_DAY} else ("", "")


def _typed() -> str:
    """The command that was typed, without its arguments: `opt-ops run set`."""
    noun, verb = _named_command()
    return " ".join(["opt-ops", *((noun, verb) if noun in _NOUNS else (noun,))]).strip()


def _plain(words: Sequence[str]) -> list[str]:
    """The words that are neither options nor the value of `-c`."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in ("-c", "--config")]


def __getattr__(name: str) -> Any:
    """`app`: the whole command, for tests and the documentation."""
    if name != "app":
        raise AttributeError(name)
    return build()
