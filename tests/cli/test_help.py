"""Help as people read it at 80 columns: which commands come first, and where lines end."""

from typing import Any

import typer.main

from opt_ops.cli import app
from opt_ops.cli.help import RunCommands, TopLevel

COMMAND: Any = typer.main.get_command(app)
EVERY_DAY = ["q", "watch", "explain", "why", "logs", "note", "events", "doctor"]


def panels(text: str) -> dict[str, list[str]]:
    """The commands of each section of a help text, in its order."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            found[line[:-1]] = names = []
        elif line.startswith("  ") and line[2:3].isalpha():
            names.append(line.split()[0])
    return found


def help_of(command: Any) -> str:
    """What `--help` prints."""
    return command.get_help(command.context_class(command, info_name=command.name, terminal_width=78))


def test_everyday_commands_come_first():
    found = panels(help_of(COMMAND))
    assert list(found)[1:] == ["Every day", "Runs", "Site", "Trying things out"]
    assert [name for name in found["Every day"] if name in EVERY_DAY] == EVERY_DAY
    assert [name for names in list(found.values())[1:] for name in names] == COMMAND.list_commands(None)
    run = panels(help_of(COMMAND.commands["run"]))
    assert list(run)[1:] == ["Look", "Steer", "Start"]


def test_every_command_has_a_panel():
    for group, panelled in ((COMMAND, TopLevel), (COMMAND.commands["run"], RunCommands)):
        named = [name for names in panelled.panels.values() for name in names]
        assert set(group.commands) <= set(named)
        assert len(named) == len(set(named))


def test_the_short_spelling_is_the_same_command():
    for name in ("watch", "explain", "logs", "note"):
        short, long = COMMAND.commands[name], COMMAND.commands["run"].commands[name]
        assert [each.opts for each in short.params] == [each.opts for each in long.params]
        assert f"opt-ops {name} " in short.help
        assert f"opt-ops run {name}" not in short.help
