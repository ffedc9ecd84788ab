"""Help as people read it at 80 columns: which commands come first, and where lines end."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from opt_ops.cli import adapted, build
from opt_ops.cli.shared.help import RunCommands, TopLevel, folded

COMMAND: Any = adapted(build())
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


def help_of(command: Any, path: str = "opt-ops") -> str:
    """What `--help` prints on a terminal of 80 columns."""
    return command.get_help(command.context_class(command, info_name=path, terminal_width=78))


def everything(command: Any = COMMAND, path: str = "opt-ops") -> Iterator[tuple[str, Any]]:
    """Every group and every command with its full name."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from everything(child, f"{path} {name}")


ALL = dict(everything())


HEADINGS = {"Usage:", "Example:", "Examples:", "Arguments:", "Options:", "Commands:"}


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\s\\]+", text))


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


@pytest.mark.parametrize("path", ALL)
def test_help_fits_80_columns_and_breaks_no_word(path: str):
    command = ALL[path]
    shown = help_of(command, path)
    context = command.context_class(command, info_name=path)
    source = [
        command.help,
        path,
        *command.collect_usage_pieces(context),
        "Usage: Example: Examples: Arguments: Options:",
    ]
    source += [text for each in command.get_params(context) for text in each.get_help_record(context) or ()]
    source += [text for name, child in getattr(command, "commands", {}).items() for text in (name, child.help)]
    source += [f"{panel}:" for panel in getattr(command, "panels", ())]
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert words(shown) <= words(" ".join(source)) | HEADINGS


@pytest.mark.parametrize("path", ALL)
def test_a_default_is_said_once(path: str):
    command = ALL[path]
    context = command.context_class(command, info_name=path)
    for each in command.get_params(context):
        record = each.get_help_record(context)
        assert record is None or record[1].count("default:") <= 1, record


@pytest.mark.parametrize("path", [path for path, command in ALL.items() if hasattr(command, "commands")])
def test_summaries_in_lists_are_short_and_whole(path: str):
    for name, child in ALL[path].commands.items():
        summary = child.get_short_help_str(1000)
        assert 0 < len(summary) <= 60, f"{path} {name}: {summary}"
        assert f" {summary}" in help_of(ALL[path], path)


@pytest.mark.parametrize("path", [path for path, command in ALL.items() if not hasattr(command, "commands")])
def test_every_example_is_on_a_line_of_its_own(path: str):
    """A shell reads the same words as are written in the code."""
    written = [line.strip() for line in re.split(r"Examples?:\s", ALL[path].help)[1].splitlines() if line.strip()]
    block = re.split(r"^  Examples?:\n", help_of(ALL[path], path), flags=re.MULTILINE)[1].split("\n\n")[0]
    shown = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()]
    assert shown == [" ".join(line.split()) for line in written]


def test_a_long_example_is_broken_between_words_only():
    line = "opt-ops node explain --line 'NVRM: Xid (PCI:0000:5d:00): 79, GPU' --card \"NVIDIA H100\" -o json"
    parts = list(folded(line, 60))
    assert parts == [
        "opt-ops node explain \\",
        "    --line 'NVRM: Xid (PCI:0000:5d:00): 79, GPU' \\",
        '    --card "NVIDIA H100" -o json',
    ]
    assert list(folded("opt-ops q", 60)) == ["opt-ops q"]
