"""How help is laid out: commands in panels, examples on lines of their own, words whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup


class _Panels(TyperGroup):
    """A group whose help lists its commands by panel. Every command is in one: a test holds that."""

    panels: Mapping[str, Sequence[str]] = {}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  (Typer's signature)
        """The names of the commands, in the order of the panels."""
        order = [name for names in self.panels.values() for name in names]
        known = [name for name in order if name in self.commands]
        return known + [name for name in self.commands if name not in order]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write one section for each panel: Typer itself knows panels only in its rich help."""
        for panel, names in self.panels.items():
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            if commands:
                with formatter.section(panel):
                    width = formatter.width - 6 - max(len(name) for name, _ in commands)
                    formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands])


class TopLevel(_Panels):
    """The commands of `opt-ops`."""

    panels: Mapping[str, Sequence[str]] = {
        "Every day": ("q", "watch", "explain", "why", "logs", "note", "events", "doctor", "pending"),
        "Runs": ("run", "campaign", "compare", "logbook", "ledger", "ckpt", "mlflow", "data"),
        "Site": ("init", "daemon", "node", "alerts", "playbook", "signals", "trainer"),
        "Trying things out": ("drill", "replay", "glossary"),
    }


class RunCommands(_Panels):
    """The commands of `opt-ops run`: looking first, then steering, then starting."""

    panels: Mapping[str, Sequence[str]] = {
        "Look": ("list", "watch", "show", "explain", "logs", "suggest", "forecast"),
        "Steer": (
            *("note", "pause", "resume", "rollback", "set"),
            *("take-over", "ask", "approve", "decline", "hand-back", "stop"),
        ),
        "Start": ("recipes", "start", "fork", "shadow", "watch-job"),
    }


def for_alias(command: Any, noun: str, name: str) -> str:
    """The help of `opt-ops NOUN NAME` for its short spelling `opt-ops NAME`."""
    return (command.__doc__ or "").replace(f"opt-ops {noun} {name}", f"opt-ops {name}")


_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_EXAMPLES = re.compile(r"^Examples?:[ \n]", re.MULTILINE)
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


class _Formatter(typer.Context.formatter_class):
    """Typer's formatter breaks `--no-wait` at its hyphens, and runs examples together in one paragraph."""

    def write_text(self, text: str) -> None:
        """Write paragraphs, then each example on a line of its own."""
        prose, *examples = _EXAMPLES.split(text, maxsplit=1)
        super().write_text(prose.rstrip().replace("-", _HYPHEN))
        lines = [line.strip() for each in examples for line in each.splitlines() if line.strip()]
        if not lines:
            return
        indent = " " * self.current_indent
        self.write(f"\n{indent}Example{'s' if len(lines) > 1 else ''}:\n")
        for line in lines:
            for part in folded(line, self.width - self.current_indent - 2):
                self.write(f"{indent}  {part}\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names with their help beside them."""
        super().write_dl([(name, help_.replace("-", _HYPHEN)) for name, help_ in rows], col_max, col_spacing)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the line that begins with `Usage`."""
        super().write_usage(prog, args.replace("-", _HYPHEN), prefix)

    def getvalue(self) -> str:
        """The whole text."""
        return super().getvalue().replace(_HYPHEN, "-")


class HelpContext(typer.Context):
    """The context of every command."""

    formatter_class = _Formatter


def folded(command: str, width: int) -> Iterator[str]:
    """A command line as lines that a shell reads as one: broken between words, with a backslash at the end.

    An option stays with its value. A word that is wider than `width` stays whole.
    """
    units: list[str] = []
    for word in _WORD.findall(command):
        if units and units[-1].startswith("-") and " " not in units[-1] and not word.startswith("-"):
            units[-1] += f" {word}"
        else:
            units.append(word)
    line = ""
    for unit in units:
        if line.strip() and len(line) + len(unit) + 3 > width:
            yield f"{line} \\"
            line = f"    {unit}"
        else:
            line = f"{line} {unit}" if line else unit
    yield line
