"""Writes docs/cli.md from the commands: `python scripts/cli_docs.py > docs/cli.md`. A test holds them equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from opt_ops.cli import app

HEAD = """# Commands

`python scripts/cli_docs.py` writes this page from the help of the commands.

- **Output.** Data goes to stdout, remarks go to stderr. If stdout is no terminal, tables are tab-separated.
- **Errors.** An error says what is wrong, and the next command. With `-o json` it is one JSON object on stderr, schema
  `opt-ops/error/1`, and stdout stays empty.
- **JSON.** `-o json` prints `{"schema": …, "items": […]}`. New fields may be added; no field is removed. Times are UTC,
  ISO 8601.
- **Locale.** What the locale lacks is written plainly: × as x, → as ->, anything unknown as ?. In JSON, control
  characters are escapes; in tables, `�`.
- **Colour.** The variable `NO_COLOR` turns colours off.
- **Completion.** `opt-ops --install-completion` installs it for bash, zsh and fish. It completes lineages, runs,
  incidents, steps, nodes, kinds of events, playbooks and terms. In zsh, the first Tab of a shell only loads it.
- **Before or after every command:** `-c FILE` names the configuration, `--debug` prints the traceback of an error.
- **Requests.** A command that sends a request to the daemon waits until the daemon has accepted it, at most 10 seconds.
  With `--wait` it waits until the request is done, with `--no-wait` it does not wait.
- **Confirmation.** A command that has `--yes` asks before it changes something. The default answer is no. `--yes` skips
  the question.
- **Dry run.** `--dry-run` prints what the daemon would do, by its own rules, and changes nothing.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | the operation failed |
| 2 | usage: the command line or the configuration is wrong |
| 3 | not found |
| 4 | refused: a precondition or a policy forbids it, or it was not confirmed |
| 5 | something is wrong, waits for you or cannot be read, as with `doctor`, `run show --check` or `pending` |
| 65 | `ckpt evaluate`, `ckpt release`, `ckpt serve`: the checkpoint is damaged |
| 75 | unavailable: something does not answer, is not running or is not installed |
| 130 | interrupted |
| 141 | the reader of the output left, as `head` does |

`node check` uses 0, 1, 2 and 3 as Nagios does: ok, warning, critical, unknown (docs/node-check.md).
"""


def commands(command: Any, path: tuple[str, ...] = ("opt-ops",)) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, without groups, in the order of the help."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name in command.list_commands(None):
        yield from commands(command.commands[name], (*path, name))


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [HEAD]
    for name, command in commands(typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([name, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])])
        parts.append(f"## {name}\n\n```\n{usage}\n```\n\n{_text(command.help)}")
        rows = [(f"`{_metavar(a)}`", a.help or "") for a in arguments]
        rows += [(f"`{', '.join([*o.opts, *o.secondary_opts])}`", _with_default(o)) for o in options]
        if rows:
            parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {left} | {right} |" for left, right in rows) + "\n")
    return "\n".join(parts)


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    many = "…" if argument.nargs == -1 else ""
    return f"{name}{many}" if argument.required else f"[{name}]{many}"


def _with_default(option: Any) -> str:
    """The help of an option, with its default unless the text has one, or the option is a switch."""
    text, default = option.help or "", option.show_default if isinstance(option.show_default, str) else option.default
    silent = option.is_flag or "[default:" in text or default in (None, "", []) or callable(default)
    return text if silent else f"{text} [default: {default}]".strip()


def _text(help_: str) -> str:
    """Help as Markdown: examples become code."""
    lines: list[str] = []
    for line in help_.strip().splitlines():
        before, colon, example = line.partition("Example: ")
        if colon and not before.strip():
            lines += ["```", example, "```"]
        elif line.strip() == "Examples:":
            lines.append("```")
        elif line.startswith("  "):
            lines.append(line.strip())
        else:
            lines.append(line)
    if lines.count("```") % 2:
        lines.append("```")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
