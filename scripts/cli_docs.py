"""Writes docs/cli.md from the commands: `python scripts/cli_docs.py > docs/cli.md`. A test holds them equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from opt_ops.cli import app

HEAD = """# Commands

Made from the commands' own help by `python scripts/cli_docs.py`.

stdout holds data only; remarks go to stderr. Not on a terminal, tables are tab-separated. `-o json` prints
`{"schema": …, "items": […]}`; its fields are only ever added to. Times in JSON are UTC, ISO 8601. `NO_COLOR` is
honoured. Completion in bash, zsh and fish: `opt-ops --install-completion`; it knows lineages, runs, incidents, steps,
nodes, kinds of events and playbooks (in zsh, the first Tab of a shell only loads it). `-c FILE` (the configuration) and
`--debug` (with an error, the traceback) may stand before or behind every command.

What is asked of the daemon waits until the daemon has taken it, at most 10 seconds; with `--wait` until it is done,
with `--no-wait` not at all. Before anything is changed, a question; No unless it is answered, and without a terminal
only with `--yes`. `--dry-run` says what would follow, by the same decisions.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | the operation failed |
| 2 | usage: the command line or the configuration cannot be right |
| 3 | not found |
| 4 | refused: a precondition or a policy forbids it, or a confirmation is missing |
| 5 | something was found (`doctor`, `ckpt verify`, `run show --check`) |
| 75 | something that should answer does not; trying again may help |
| 130 | interrupted |

`node check` uses 0, 1, 2 and 3 as Nagios does: ok, warning, critical, unknown (docs/node-check.md).
"""


def commands(command: Any, path: tuple[str, ...] = ("opt-ops",)) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups left out."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [HEAD]
    for name, command in commands(typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([name, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])])
        parts.append(f"## {name}\n\n```\n{usage}\n```\n\n{_text(command.help)}")
        rows = [(f"`{_metavar(a)}`", a.help or "") for a in arguments]
        rows += [(f"`{', '.join([*o.opts, *o.secondary_opts])}`", o.help or "") for o in options]
        if rows:
            parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {left} | {right} |" for left, right in rows) + "\n")
    return "\n".join(parts)


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


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
