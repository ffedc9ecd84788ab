"""`opt-ops node …`: the nodes of a lineage, their health, and which of them attempts may use."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from opt_ops.cli import node_check, node_ledger
from opt_ops.cli.options import (
    FormatOption,
    HeaderOption,
    IdArgument,
    Lineage,
    ReasonOption,
    RequestOptions,
    complete_id,
    complete_node,
    find_lineage,
    lineage_folder,
    newest_lineage,
    with_request_options,
)
from opt_ops.cli.output import Column, Format, say, show
from opt_ops.cli.requests import PendingRequest
from opt_ops.core.health import HEALTH_TABLE
from opt_ops.core.health.explain import described, look_up, look_up_line
from opt_ops.core.state.fold import replay
from opt_ops.core.text import age, iso
from opt_ops.errors import NotFound, UsageError
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, help="Show, test, exclude and allow nodes.")
app.command(cls=node_check.Plugin)(node_check.check)
app.command()(node_ledger.ledger)

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.", autocompletion=complete_node)]

_COLUMNS = [
    Column("NODE", "node"),
    Column("VERDICT", "verdict"),
    Column("REASON", "reason"),
    Column("HELD", "held"),
    Column("RUNS", "attempt"),
    Column("EXCLUDED", "excluded_by"),
    Column("DRAIN", "drain"),
    Column("SINCE", "age", right=True),
    Column("SOURCE", "source", wide=True),
]


@app.command("list")
def list_(
    identifier: Annotated[
        str, typer.Argument(metavar="[ID]", help="Lineage. [default: the newest]", autocompletion=complete_id)
    ] = "",
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """List the nodes of a lineage with their verdicts and the source of each verdict.

    Example: opt-ops node list 12 -o wide
    """
    state = (find_lineage(identifier) if identifier else newest_lineage()).state
    held = state.held
    used = state.attempt.nodes if state.attempt and state.attempt.live else ()
    rows = [
        {
            "node": node.name,
            "verdict": str(node.verdict),
            "reason": node.reason,
            "source": node.source,
            "held": node.name in held,
            "attempt": state.attempt.name if state.attempt and node.name in used else None,
            "excluded_by": node.excluded_by,
            "drain": node.drain,
            "since": iso(node.at) if node.at else None,
            "age": age(time.time() - node.at) if node.at else None,
            "evidence": dict(node.evidence),
        }
        for node in state.nodes.values()
    ]
    show("opt-ops/node-list/1", rows, _COLUMNS, output, header=header)


@app.command()
def explain(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[REASON]", help="A reason code, or xid 94, or sxid 12028.")
    ] = None,
    line: Annotated[
        str | None, typer.Option("--line", metavar="TEXT", help="A line of the kernel log, with or without prefixes.")
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="NAME", help="With --line: product name of the GPU.")
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Explain a reason code or a kernel log error: its verdict, its action, its source.

    With --line, a line that reports no error gives no items, and exit code 0.

    Examples:
      opt-ops node explain xid 94
      opt-ops node explain sxid 12028
      opt-ops node explain remap_pending -o json
      opt-ops node explain --line "NVRM: Xid (PCI:0000:5d:00): 79, GPU has fallen off the bus." --card "NVIDIA H100"
    """
    if (line is None) == (what is None) or (card is not None and line is None):
        raise UsageError(
            "give either a reason code or --line; --card needs --line", "opt-ops node explain --help has examples"
        )
    if line is not None:
        rows = [{**described(row), "table": HEALTH_TABLE, **said} for said, row in look_up_line(line, card)]
        if not rows:
            say("the line reports no error of a GPU or an NVSwitch")
    else:
        rows = [{**described(row), "table": HEALTH_TABLE} for row in look_up(what or ())]
        if not rows:
            raise NotFound(f"the health table has no {' '.join(what or ())}", "docs/health.md lists all reason codes")
    if output in (Format.TABLE, Format.WIDE):
        lines = [{"field": name.replace("_", " "), "value": row[name]} for row in rows for name in row]
        show("", lines, [Column("FIELD", "field"), Column("VALUE", "value")], output, header=False)
    else:
        show("opt-ops/node-explain/1", rows, [Column("REASON", "reason")], output)


@app.command()
@with_request_options()
def exclude(
    identifier: IdArgument, name: NodeArgument, options: RequestOptions, reason: ReasonOption = "excluded by hand"
) -> None:
    """Exclude a node: no attempt of the lineage starts there, and Slurm drains it where that is permitted.

    A running attempt stays on the node until `opt-ops run resume` or the next recovery moves it.

    Example: opt-ops node exclude 12 n031 --reason "fan"
    """
    request = PendingRequest(find_lineage(identifier), "exclude", {"node": name, "reason": reason}, options)
    request.send(f"Exclude {name}, and drain it?")


@app.command()
@with_request_options()
def allow(
    identifier: IdArgument,
    name: NodeArgument,
    options: RequestOptions,
    reason: ReasonOption = "allowed by hand",
    retest: Annotated[
        bool, typer.Option("--retest", help="Read its health and burn it in first; refuse unless it is healthy.")
    ] = False,
) -> None:
    """Allow attempts on an excluded node again. Prints first why it was excluded, and its record of failures.

    It stays drained in Slurm until `scontrol update nodename=… state=resume`.

    Examples:
      opt-ops node allow 12 n031 --reason "GPU 3 was exchanged"
      opt-ops node allow 12 n031 --retest
    """
    path = lineage_folder(identifier)
    entries = lineages.entries(path)
    lineage = Lineage(path, replay(entries))
    for line in node_ledger.why_excluded(lineage.state, entries, name):
        say(line, options.quiet)
    known = lineage.state.nodes.get(name)
    if retest and known is not None and known.excluded_by:
        node_check.retest(lineage, name, known.excluded_at)
    question = f"Allow attempts on {name} again{'' if retest else ', without a test (--retest)'}?"
    PendingRequest(lineage, "allow", {"node": name, "reason": reason}, options).send(question)
