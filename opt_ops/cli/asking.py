"""What all commands have in common that ask the daemon for something: say what would follow, ask back, wait, answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opt_ops import lineages, views
from opt_ops.cli.common import ask_daemon, author, confirm, daemon_alive, lineage_folder, settings, show_answer
from opt_ops.core.events import RequestRefused
from opt_ops.errors import Refused
from opt_ops.render import Format, say


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and how it is to be made."""

    verb: str
    arguments: Mapping[str, Any]
    question: str
    yes: bool
    dry_run: bool
    output: Format
    quiet: bool
    by: str

    def send(self, identifier: str, *, look: str = "run show", remark: str = "", needs_daemon: str = "") -> None:
        """Ask for it, or with `dry_run` print what would follow.

        Args:
            identifier: of the lineage, or of a run or attempt of it.
            look: the command that shows what came of it.
            remark: the last line of a dry run.
            needs_daemon: why this cannot wait for a daemon, if it cannot.

        Raises:
            Refused: it cannot be done, was not confirmed, or must not wait.
        """
        from opt_ops.ports import (
            Request,
        )  # these two bring most of the core, and `run show` is in one module with `run stop`
        from opt_ops.watch.requests import event_of

        path, who = lineage_folder(identifier), author(self.by)
        state = lineages.state(path)
        request = Request(request="dry-run", author=who, verb=self.verb, arguments=self.arguments)
        event = event_of(state, request)
        if isinstance(event, RequestRefused):
            raise Refused(f"lineage {path.name}: {event.why}")
        if self.dry_run:
            for line in views.foresee(state, event, time.time(), settings.config):
                print(line)
            if remark:
                print(remark)
            return
        if needs_daemon and not daemon_alive(settings.config.runs):
            raise Refused(f"no daemon is watching: {needs_daemon}", "opt-ops daemon run")
        confirm(self.question, self.yes)
        show_answer(ask_daemon(path, who, self.verb, self.arguments, self.quiet), self.output)
        say(f"  next: opt-ops {look} {path.name}", self.quiet)
