"""`opt-ops drill …`: put in a fault on purpose. It is journaled first, and marked as a drill all the way to the
logbook."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from opt_ops import lineages, views
from opt_ops.cli.common import (
    AuthorOption,
    DryRunOption,
    FormatOption,
    IdArgument,
    QuietOption,
    YesOption,
    ask_daemon,
    author,
    confirm,
    daemon_alive,
    lineage_folder,
    settings,
    show_answer,
)
from opt_ops.core.values import Fault
from opt_ops.errors import Refused
from opt_ops.ports import Request
from opt_ops.render import Format, say
from opt_ops.watch.requests import event_of

app = typer.Typer(no_args_is_help=True, help="Put in a fault on purpose, to see that it is recovered.")


@app.command("kill-rank")
def kill_rank(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Kill a rank of the running attempt with SIGKILL.

    Example: opt-ops drill kill-rank 12 --rank 3
    """
    _Drill(Fault.KILL_RANK, {"rank": rank}, f"Kill rank {rank} with SIGKILL?", yes, dry_run, output, quiet, by).put_in(
        identifier
    )


@app.command()
def hang(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Stop a rank of the running attempt with SIGSTOP: it neither dies nor comes to the next collective.

    Example: opt-ops drill hang 12 --rank 3
    """
    _Drill(Fault.HANG, {"rank": rank}, f"Stop rank {rank} with SIGSTOP?", yes, dry_run, output, quiet, by).put_in(
        identifier
    )


@app.command()
def xid(
    identifier: IdArgument,
    node: Annotated[str, typer.Option(help="Which held node.")],
    code: Annotated[int, typer.Option("--xid", min=1, help="The Xid that its kernel log shows.")] = 79,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let a node's agent find an Xid in its kernel log. 79: the GPU has fallen off the bus.

    Example: opt-ops drill xid 12 --node n2 --xid 79
    """
    _Drill(
        Fault.XID, {"node": node, "xid": code}, f"Report Xid {code} on {node}?", yes, dry_run, output, quiet, by
    ).put_in(identifier)


@app.command()
def lr(
    identifier: IdArgument,
    factor: Annotated[float, typer.Option(min=1.0, help="By which the learning rate is multiplied.")] = 40.0,
    updates: Annotated[int, typer.Option(min=1, help="For how many updates.")] = 30,
    from_step: Annotated[int, typer.Option(help="Not before this step. [default: now]")] = 0,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Multiply the learning rate for some updates, so that the loss really diverges.

    Example: opt-ops drill lr 12 --factor 40 --updates 30
    """
    arguments = {"factor": factor, "updates": updates, "from_step": from_step}
    question = f"Multiply the learning rate by {factor:g} for {updates} updates? What they train is rolled back."
    _Drill(Fault.LR, arguments, question, yes, dry_run, output, quiet, by).put_in(identifier)


@app.command("kill-daemon")
def kill_daemon(
    identifier: IdArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Kill the daemon with SIGKILL. Something else must start it again.

    Example: opt-ops drill kill-daemon 12
    """
    _Drill(Fault.KILL_DAEMON, {}, "Kill the daemon with SIGKILL?", yes, dry_run, output, quiet, by).put_in(identifier)


@dataclass(frozen=True, slots=True)
class _Drill:
    """What all drills have in common."""

    fault: Fault
    arguments: dict[str, Any]
    question: str
    yes: bool
    dry_run: bool
    output: Format
    quiet: bool
    by: str

    def put_in(self, identifier: str) -> None:
        path = lineage_folder(identifier)
        state = lineages.state(path)
        if state.ended:
            raise Refused(f"lineage {path.name} is {state.status}: there is nothing to disturb")
        who, arguments = author(self.by), {"fault": str(self.fault), **self.arguments}
        if self.dry_run:
            event = event_of(state, Request(request="dry-run", author=who, verb="drill", arguments=arguments))
            for line in views.foresee(state, event, time.time(), settings.config):
                print(line)
            return
        if not daemon_alive(settings.config.runs):
            raise Refused("no daemon is watching: a fault would not be recovered", "opt-ops daemon run")
        confirm(f"A drill on lineage {path.name}. {self.question}", self.yes)
        show_answer(ask_daemon(path, who, "drill", arguments, self.quiet), self.output)
        say(f"  next: opt-ops run explain {path.name}", self.quiet)
