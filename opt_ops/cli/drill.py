"""`opt-ops drill …`: put in a fault on purpose. It is journaled first, and marked as a drill all the way to the
logbook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from opt_ops.cli.options import FormatOption, IdArgument, QuietOption, complete_node
from opt_ops.cli.output import Format
from opt_ops.cli.requests import Asked, AuthorOption, DryRunOption, WaitOption, YesOption
from opt_ops.core.values import Fault

app = typer.Typer(no_args_is_help=True, help="Put in a fault on purpose, to see that it is recovered.")


@app.command("kill-rank")
def kill_rank(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Kill a rank of the running attempt with SIGKILL.

    Example: opt-ops drill kill-rank 12 --rank 3
    """
    question = f"Kill rank {rank} with SIGKILL?"
    _put_in(identifier, Fault.KILL_RANK, {"rank": rank}, question, yes, dry_run, output, quiet, by, wait)


@app.command()
def hang(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Stop a rank of the running attempt with SIGSTOP: it neither dies nor comes to the next collective.

    Example: opt-ops drill hang 12 --rank 3
    """
    question = f"Stop rank {rank} with SIGSTOP?"
    _put_in(identifier, Fault.HANG, {"rank": rank}, question, yes, dry_run, output, quiet, by, wait)


@app.command("flip-bit")
def flip_bit(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Which rank.")] = 1,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let a rank of the running attempt flip a bit of its weights: silent data corruption.

    The ranks compare what they hold right after it. Under checksum_every=0 nothing is compared, and nothing flipped.

    Example: opt-ops drill flip-bit 12 --rank 3
    """
    question = f"Flip a bit of the weights of rank {rank}? What was trained since the last checksum is rolled back."
    _put_in(identifier, Fault.FLIP_BIT, {"rank": rank}, question, yes, dry_run, output, quiet, by, wait)


@app.command()
def xid(
    identifier: IdArgument,
    node: Annotated[str, typer.Option(help="Which held node.", autocompletion=complete_node)],
    code: Annotated[int, typer.Option("--xid", min=1, help="The Xid that its kernel log shows.")] = 79,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let a node's agent find an Xid in its kernel log. 79: the GPU has fallen off the bus.

    Example: opt-ops drill xid 12 --node n2 --xid 79
    """
    question = f"Report Xid {code} on {node}?"
    _put_in(identifier, Fault.XID, {"node": node, "xid": code}, question, yes, dry_run, output, quiet, by, wait)


@app.command()
def lr(
    identifier: IdArgument,
    factor: Annotated[float, typer.Option(min=1.0, help="By which the learning rate is multiplied.")] = 40.0,
    updates: Annotated[int, typer.Option(min=1, help="For how many updates.")] = 30,
    from_step: Annotated[int, typer.Option(help="Not before this step. [default: now]")] = 0,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Multiply the learning rate for some updates, so that the loss really diverges.

    Example: opt-ops drill lr 12 --factor 40 --updates 30
    """
    arguments = {"factor": factor, "updates": updates, "from_step": from_step}
    question = f"Multiply the learning rate by {factor:g} for {updates} updates? What they train is rolled back."
    _put_in(identifier, Fault.LR, arguments, question, yes, dry_run, output, quiet, by, wait)


@app.command("kill-daemon")
def kill_daemon(
    identifier: IdArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Kill the daemon with SIGKILL. Something else must start it again.

    Example: opt-ops drill kill-daemon 12
    """
    _put_in(identifier, Fault.KILL_DAEMON, {}, "Kill the daemon with SIGKILL?", yes, dry_run, output, quiet, by, wait)


def _put_in(
    identifier: str,
    fault: Fault,
    arguments: Mapping[str, Any],
    question: str,
    yes: bool,
    dry_run: bool,
    output: Format,
    quiet: bool,
    by: str,
    wait: bool | None,
) -> None:
    question = f"A drill on lineage {identifier}. {question}"
    asked = Asked("drill", {"fault": str(fault), **arguments}, question, yes, dry_run, output, quiet, by, wait)
    asked.send(identifier, look="run explain", needs_daemon="a fault would not be recovered")
