"""How help is laid out: commands in panels, in the order in which an operator needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        "Runs": ("run", "compare", "logbook", "ledger", "ckpt", "mlflow", "data"),
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
