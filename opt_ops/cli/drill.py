"""`opt-ops drill …`: put in a fault on purpose. It is journaled first, and marked as a drill all the way to the
logbook."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opt_ops import lineages
from opt_ops.cli.common import (
    AuthorOption,
    IdArgument,
    QuietOption,
    YesOption,
    ask_daemon,
    author,
    confirm,
    daemon_alive,
    lineage_folder,
    settings,
)
from opt_ops.core.values import Fault
from opt_ops.errors import Refused
from opt_ops.render import say

app = typer.Typer(no_args_is_help=True, help="Put in a fault on purpose, to see that it is recovered.")


@app.command("kill-rank")
def kill_rank(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Kill a rank of the running attempt with SIGKILL.

    Example: opt-ops drill kill-rank 12 --rank 3
    """
    _put_in(identifier, Fault.KILL_RANK, {"rank": rank}, f"Kill rank {rank} with SIGKILL?", yes, quiet, by)


@app.command()
def xid(
    identifier: IdArgument,
    node: Annotated[str, typer.Option(help="Which held node.")],
    code: Annotated[int, typer.Option("--xid", min=1, help="The Xid that its kernel log shows.")] = 79,
    yes: YesOption = False,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let a node's agent find an Xid in its kernel log. 79: the GPU has fallen off the bus.

    Example: opt-ops drill xid 12 --node n2 --xid 79
    """
    _put_in(identifier, Fault.XID, {"node": node, "xid": code}, f"Report Xid {code} on {node}?", yes, quiet, by)


@app.command()
def lr(
    identifier: IdArgument,
    factor: Annotated[float, typer.Option(min=1.0, help="By which the learning rate is multiplied.")] = 40.0,
    updates: Annotated[int, typer.Option(min=1, help="For how many updates.")] = 30,
    from_step: Annotated[int, typer.Option(help="Not before this step. [default: now]")] = 0,
    yes: YesOption = False,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Multiply the learning rate for some updates, so that the loss really diverges.

    Example: opt-ops drill lr 12 --factor 40 --updates 30
    """
    arguments = {"factor": factor, "updates": updates, "from_step": from_step}
    question = f"Multiply the learning rate by {factor:g} for {updates} updates? What they train is rolled back."
    _put_in(identifier, Fault.LR, arguments, question, yes, quiet, by)


@app.command("kill-daemon")
def kill_daemon(
    identifier: IdArgument, yes: YesOption = False, quiet: QuietOption = False, by: AuthorOption = ""
) -> None:
    """Kill the daemon with SIGKILL. Something else must start it again.

    Example: opt-ops drill kill-daemon 12
    """
    _put_in(identifier, Fault.KILL_DAEMON, {}, "Kill the daemon with SIGKILL?", yes, quiet, by)


def _put_in(
    identifier: str, fault: Fault, arguments: dict[str, Any], question: str, yes: bool, quiet: bool, by: str
) -> None:
    path = lineage_folder(identifier)
    state = lineages.state(path)
    if state.ended:
        raise Refused(f"lineage {path.name} is {state.status}: there is nothing to disturb")
    if not daemon_alive(settings.config.runs):
        raise Refused("no daemon is watching: a fault would not be recovered", "opt-ops daemon run")
    confirm(f"A drill on lineage {path.name}. {question}", yes)
    ask_daemon(path, author(by), "drill", {"fault": str(fault), **arguments}, 10.0, quiet)
    say(f"  next: opt-ops run explain {path.name}", quiet)
