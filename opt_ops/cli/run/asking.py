"""`opt-ops run ask|approve|decline`: opt-ops asks before it acts, and you answer."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
import typer.main

from opt_ops.cli.run import commands as run
from opt_ops.cli.run import control as run_control
from opt_ops.cli.shared import proposals
from opt_ops.cli.shared.options import (
    ChangedIdArgument,
    ReasonOption,
    RequestOptions,
    find_lineage,
    seconds_of,
    with_request_options,
)
from opt_ops.cli.shared.requests import PendingRequest
from opt_ops.core.text import printable
from opt_ops.core.values import AskDefault, Driver
from opt_ops.errors import UsageError

_INSTEAD = ("rollback", "set", "pause", "stop")

ProposalArgument = Annotated[
    str, typer.Argument(metavar="PROPOSAL", help="Proposal 12-i007-p1, or its incident 12-i007.", show_default=False)
]


@run.app.command()
@with_request_options()
def ask(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="SPAN", help="How long a proposal waits. [default: the playbook's]")
    ] = "",
    default: Annotated[
        AskDefault | None,
        typer.Option("--default", help="What happens at the deadline. [default: the playbook's]"),
    ] = None,
    only: Annotated[
        str,
        typer.Option("--only", metavar="ACTIONS", help="Ask about these actions only: replace_ranks,restart,rollback."),
    ] = "",
    reason: ReasonOption = "asked to see recoveries first",
) -> None:
    """Ask before acting: recoveries wait for your answer.

    From now on the daemon proposes a restart or rollback, and does it when you approve it. Without an answer, the
    playbook's default holds at the deadline. `opt-ops pending` lists what waits; `opt-ops run hand-back` ends it.

    Examples:
      opt-ops run ask 12
      opt-ops run ask 12 --only rollback --deadline 30m --default wait
    """
    arguments: dict[str, Any] = {
        "driver": str(Driver.ASK),
        "reason": reason,
        "default": str(default) if default else None,
        "seconds": seconds_of("--deadline", deadline) if deadline else None,
        "only": [each.strip() for each in only.split(",") if each.strip()],
    }
    PendingRequest(find_lineage(identifier), "drive", arguments, options).send(
        "Ask before acting? Recoveries wait for your answer, until their deadline."
    )


@run.app.command()
@with_request_options()
def approve(identifier: ProposalArgument, options: RequestOptions, reason: ReasonOption = "") -> None:
    """Approve a proposal: it is done now.

    The approval holds for what the proposal shows. If that has changed, it is refused with exit code 4, and the message
    names the proposal that is open now. On a terminal you are asked to confirm it.

    Example: opt-ops run approve 12-i007 --reason "the spike is real"
    """
    _answer("approve", identifier, options, reason)


@run.app.command()
@with_request_options()
def decline(
    identifier: ProposalArgument,
    options: RequestOptions,
    reason: ReasonOption = "",
    instead: Annotated[
        str,
        typer.Option("--instead", metavar="COMMAND", help='What is done instead, such as "rollback --to 59000".'),
    ] = "",
) -> None:
    """Decline a proposal: it is not done.

    It is not proposed again for this incident. Trouble that gets worse is an incident of its own. Where nothing trains,
    nothing is started until you resume, roll back or hand back.

    Examples:
      opt-ops run decline 12-i007 --reason "the data is known"
      opt-ops run decline 12-i007 --instead "rollback --to 59000 --lr-scale 0.5"
    """
    try:
        words = shlex.split(instead)
    except ValueError as error:
        raise UsageError(f"--instead {instead}: {error}", 'for example "rollback --to 59000"') from None
    if instead and (not words or words[0] not in _INSTEAD):
        raise UsageError(f"--instead {instead}: not one of {', '.join(_INSTEAD)}", 'for example "rollback --to 59000"')
    if words:
        author = ["--author", options.author] if options.author else []
        words = [words[0], find_lineage(identifier).name, *words[1:], *author]
        with contextlib.redirect_stdout(io.StringIO()):
            _run([*words, "--dry-run"])  # it must be possible before anything is declined
    _answer("decline", identifier, options, reason)
    if words:
        _run([*words, "--dry-run" if options.dry_run else "--yes"])


def _answer(verb: str, identifier: str, options: RequestOptions, reason: str) -> None:
    lineage = find_lineage(identifier)
    waits = proposals.rows(lineage.path, lineage.state)
    named = next((row for row in waits if identifier in (row["proposal"], row["incident"])), None)
    arguments = {"proposal": named["proposal"] if named else identifier, "reason": reason}
    asked = sys.stdin is not None and sys.stdin.isatty()
    shown = printable(f"{named['proposal']} {named['text']}. {verb.capitalize()} it?") if named else ""
    PendingRequest(lineage, verb, arguments, replace(options, yes=options.yes or not asked)).send(shown)


def _run(words: Sequence[str]) -> None:
    """Run a command of run_control. Its errors are those of this command."""
    typer.main.get_command(run_control.run.app).main(args=list(words), prog_name="opt-ops run", standalone_mode=False)
