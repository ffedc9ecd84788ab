"""`opt-ops drill …`: inject a fault. It is journaled before it happens, and marked as a drill everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from opt_ops.cli.shared.foreseen import FAULT
from opt_ops.cli.shared.options import (
    ChangedIdArgument,
    Lineage,
    RequestOptions,
    complete_node,
    find_lineage,
    split_id,
    with_request_options,
)
from opt_ops.cli.shared.requests import PendingRequest
from opt_ops.core.values import Fault

_HELP = """Inject a fault, to see that the daemon recovers from it.

    kill-rank, kill-node, xid and hang take the path of recovery in place if it is on and a standby is ready: the other
    ranks keep running (docs/in-place.md). kill-pair and slow-standby show the way back to a restart of all ranks."""

app = typer.Typer(no_args_is_help=True, help=_HELP)

RankOption = Annotated[
    int | None, typer.Option(min=0, help="Number of the rank. [default: 1; 0 if there is only one rank]")
]

_MOST_FACTOR, _MOST_UPDATES = 1e6, 10_000  # a drill is to be seen and undone
_MOST_SECONDS = 86400.0


class Place(StrEnum):
    """Where in a step a rank kills itself: `opt_ops.contract.drills.IN_STEP`."""

    FORWARD = "forward"
    BACKWARD = "backward"
    MEASURE = "measure"
    UPDATE = "update"
    COPY = "copy"
    CONFIRM = "confirm"


InStepOption = Annotated[
    Place | None, typer.Option("--in-step", help="The place of a step at which it dies. [default: at any moment]")
]


@app.command("kill-rank")
@with_request_options()
def kill_rank(
    identifier: ChangedIdArgument, options: RequestOptions, rank: RankOption = None, in_step: InStepOption = None
) -> None:
    """Kill a rank of the running attempt with SIGKILL. If a standby is ready, only that rank is replaced.

    Without --in-step, the agent of its node kills it at once. With it, the rank kills itself at that place of its next
    step. Our trainer can do that, if its ranks can be replaced in place.

    Examples:
      opt-ops drill kill-rank 12 --rank 3
      opt-ops drill kill-rank 12 --rank 3 --in-step backward
    """
    where = f", at the place {in_step} of its next step" if in_step else ""
    more = {"in_step": str(in_step)} if in_step else {}
    _inject_on_rank(identifier, Fault.KILL_RANK, rank, f"Kill rank {{}} with SIGKILL{where}?", options, more)


@app.command("kill-node")
@with_request_options()
def kill_node(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    node: Annotated[
        str | None,
        typer.Argument(metavar="NODE", help="A node on which ranks run.", autocompletion=complete_node),
    ] = None,
) -> None:
    """Kill all ranks of a node with SIGKILL. The node itself stays. If a standby is ready, a spare takes its place.

    Example: opt-ops drill kill-node 12 n2
    """
    identifier, node = split_id(identifier, node, "opt-ops drill kill-node 12 n2", quiet=options.quiet)
    _inject(find_lineage(identifier), Fault.KILL_NODE, {"node": node}, f"Kill all ranks on {node}?", options)


@app.command("kill-pair")
@with_request_options()
def kill_pair(identifier: ChangedIdArgument, options: RequestOptions, rank: RankOption = None) -> None:
    """Kill a rank and the rank that keeps its copy. No copy of its state is left, so all ranks are restarted.

    Example: opt-ops drill kill-pair 12 --rank 0
    """
    question = "Kill rank {} and the rank that keeps its copy with SIGKILL? Steps since the last save are discarded."
    _inject_on_rank(identifier, Fault.KILL_PAIR, rank, question, options)


@app.command("slow-standby")
@with_request_options()
def slow_standby(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=_MOST_SECONDS, help="How long each of them waits before it joins.")
    ] = 180.0,
) -> None:
    """Let processes that replace lost ranks wait.

    This lasts until the attempt ends. It hits nobody by itself.

    If they wait for longer than recovery.in_place_seconds, all ranks are restarted. Next: opt-ops drill kill-rank.

    Example: opt-ops drill slow-standby 12 --seconds 180
    """
    question = f"Let processes that take the place of a lost rank wait for {seconds:g} s?"
    _inject(find_lineage(identifier), Fault.SLOW_STANDBY, {"seconds": seconds}, question, options)


@app.command()
@with_request_options()
def hang(identifier: ChangedIdArgument, options: RequestOptions, rank: RankOption = None) -> None:
    """Stop a rank of the running attempt with SIGSTOP. It does not end, and never joins the next collective.

    If a standby is ready, and the rank alone does not answer, only it is replaced.

    Example: opt-ops drill hang 12 --rank 3
    """
    _inject_on_rank(identifier, Fault.HANG, rank, "Stop rank {} with SIGSTOP?", options)


@app.command("flip-bit")
@with_request_options()
def flip_bit(identifier: ChangedIdArgument, options: RequestOptions, rank: RankOption = None) -> None:
    """Flip a bit in the weights of a rank: silent corruption.

    The ranks compare checksums right after it. With checksum_every=0 they compare nothing, and no bit is flipped.

    Example: opt-ops drill flip-bit 12 --rank 3
    """
    question = "Flip a bit of the weights of rank {}? Steps since the last checksum are discarded."
    _inject_on_rank(identifier, Fault.FLIP_BIT, rank, question, options)


@app.command()
@with_request_options()
def xid(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    node: Annotated[str, typer.Option(help="A node that the lineage holds.", autocompletion=complete_node)],
    code: Annotated[int, typer.Option("--xid", min=1, help="The Xid that its kernel log shows.")] = 79,
) -> None:
    """Let a node's agent find an Xid in its kernel log. Xid 79: the GPU has fallen off the bus.

    If the Xid makes the node bad and a standby is ready, a spare takes the place of the node.

    Example: opt-ops drill xid 12 --node n2 --xid 79
    """
    _inject(find_lineage(identifier), Fault.XID, {"node": node, "xid": code}, f"Report Xid {code} on {node}?", options)


@app.command()
@with_request_options()
def lr(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    factor: Annotated[float, typer.Option(min=1.0, max=_MOST_FACTOR, help="Factor on the learning rate.")] = 40.0,
    updates: Annotated[int, typer.Option(min=1, max=_MOST_UPDATES, help="Number of updates.")] = 30,
    from_step: Annotated[int, typer.Option(min=0, help="First step at which it may begin. [default: now]")] = 0,
) -> None:
    """Multiply the learning rate for some updates. The daemon must read it back, and roll back to before them.

    Example: opt-ops drill lr 12 --factor 40 --updates 30
    """
    arguments = {"factor": factor, "updates": updates, "from_step": from_step}
    lineage = find_lineage(identifier)
    attempt = lineage.state.attempt
    first = max(from_step, (attempt.last_step or 0) + 1 if attempt is not None else 0)
    when = f"steps {first} to {first + updates - 1}, or as soon after as the trainer reads it"
    question = f"Multiply the learning rate by {factor:g} for {updates} updates ({when})? Their steps are discarded."
    _inject(lineage, Fault.LR, arguments, question, options)


@app.command()
@with_request_options()
def nan(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    from_step: Annotated[int, typer.Option(min=0, help="First step at which it may come. [default: now]")] = 0,
) -> None:
    """Make the loss of an update NaN. The trainer must not apply it, and ends with 82. The daemon must roll back.

    A trainer that does not know this drill ends with 78, and the lineage halts. `opt-ops trainer check` tells before.

    Example: opt-ops drill nan 12
    """
    lineage = find_lineage(identifier)
    attempt = lineage.state.attempt
    first = max(from_step, (attempt.last_step or 0) + 1 if attempt is not None else 0)
    question = f"Make the loss of step {first} NaN, or of the step at which the trainer reads it? Steps are discarded."
    _inject(lineage, Fault.NAN, {"from_step": from_step}, question, options)


@app.command("kill-daemon")
@with_request_options()
def kill_daemon(identifier: ChangedIdArgument, options: RequestOptions) -> None:
    """Kill the daemon with SIGKILL. Something else must start it again.

    Example: opt-ops drill kill-daemon 12
    """
    _inject(find_lineage(identifier), Fault.KILL_DAEMON, {}, "Kill the daemon with SIGKILL?", options)


def _inject_on_rank(
    identifier: str,
    fault: Fault,
    rank: int | None,
    question: str,
    options: RequestOptions,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Inject a fault of one rank; without a rank, of one that exists."""
    lineage = find_lineage(identifier)
    attempt = lineage.state.attempt
    ranks = attempt.ranks if attempt is not None else 2
    chosen = rank if rank is not None else min(1, max(ranks - 1, 0))
    _inject(lineage, fault, {"rank": chosen, **(more or {})}, question.format(chosen), options)


def _inject(
    lineage: Lineage, fault: Fault, arguments: Mapping[str, Any], question: str, options: RequestOptions
) -> None:
    request = PendingRequest(lineage, "drill", {"fault": str(fault), **arguments}, options)
    request.send(
        f"Drill on lineage {lineage.name}. {question}",
        look="run explain",
        loss=FAULT,
        needs_daemon="nothing would recover from the fault",
    )
