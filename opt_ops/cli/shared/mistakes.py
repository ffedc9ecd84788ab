"""Errors as people and programs get them: one line that names the option, the next command, or one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from opt_ops.cli.shared.output import say
from opt_ops.errors import NotFound, Refused, Unavailable, UsageError

# By pydantic's type of error: what the value must be, with the limit.
_LIMITS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "int_parsing": "not a whole number",
    "int_from_float": "not a whole number",
    "float_parsing": "not a number",
}


def is_usage_error(error: BaseException) -> bool:
    """Whether it is Typer's error for a command line: its class is not public, its exit code is."""
    return getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message")


def usage_error(error: Any) -> tuple[str, str]:
    """Message and hint of Typer's error for a command line."""
    said = error.format_message()
    parameter, invalid = getattr(error, "param", None), _invalid(error.__cause__)
    if parameter is not None and invalid:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        wanted = _LIMITS.get(invalid["type"])
        limits = {key: f"{value:g}" for key, value in invalid.get("ctx", {}).items() if isinstance(value, int | float)}
        what = wanted.format(**limits) if wanted else _plain(str(invalid["msg"]))
        said = f"{name} {invalid['input']}: {what}"
    context = getattr(error, "ctx", None)
    return said, f"{context.command_path} -h" if context is not None else ""


def _plain(message: str) -> str:
    """Pydantic's sentence without its first words: `Value error, 'x' is not one of …`."""
    for words in ("Input should be ", "Value error, "):
        message = message.removeprefix(words)
    return message.rstrip(".")


def _invalid(cause: Any) -> Mapping[str, Any] | None:
    """The first of pydantic's errors behind it."""
    errors: Sequence[Mapping[str, Any]] = cause.errors() if hasattr(cause, "errors") else ()
    return errors[0] if errors else None


def for_programs(words: Sequence[str]) -> bool:
    """Whether the command line asks for JSON: an error may come before it is parsed."""
    own = list(words[: words.index("--")] if "--" in words else words)
    forms = {"json", "jsonl"}
    joined = any(word.removeprefix("--output=").removeprefix("-o") in forms for word in own if word[:1] == "-")
    return joined or any(word in ("-o", "--output") and value in forms for word, value in pairwise(own))


_A_COMMAND = re.compile(
    r"\b(opt-ops|python3?|pip|make|mlflow|mv|rm|cp|ls|ps|id|kill|tail|chmod|scontrol|squeue|sacct)(?= )|/python\d* "
)


def with_command(hint: str, code: int, typed: str) -> str:
    """The hint with a command to run next. A wrong command line has one in any case: its help.

    Args:
        hint: What to do next, in words or as a command.
        code: The exit code.
        typed: The command that was typed, without its arguments.
    """
    if _A_COMMAND.search(hint):
        return hint
    if code == UsageError.exit_code or (hint and code in (NotFound.exit_code, Refused.exit_code)):
        return f"{hint}; see {typed} -h" if hint else f"{typed} -h"
    return hint or ("opt-ops doctor" if code == Unavailable.exit_code else "")


def say_error(message: str, hint: str, code: int, *, programs: bool) -> None:
    """Write an error to stderr, for people or for programs."""
    if programs:
        error = {"schema": "opt-ops/error/1", "error": message, "hint": hint or None, "exit_code": code}
        say(json.dumps(error))
        return
    say(f"opt-ops: {message}")
    if hint:
        say(f"  next: {hint}")
