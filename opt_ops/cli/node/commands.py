"""`opt-ops node …`: the nodes of a lineage, their health, and which of them attempts may use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opt_ops.cli.node import check as node_check
from opt_ops.cli.node import ledger as node_ledger
from opt_ops.cli.shared.options import (
    ChangedIdArgument,
    FormatOption,
    HeaderOption,
    Lineage,
    ReasonOption,
    RequestOptions,
    complete_id,
    complete_node,
    find_lineage,
    leave_if_unreadable,
    lineage_folder,
    no_lineage,
    site_lineages,
    split_id,
    watch_now,
    with_request_options,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.requests import PendingRequest
from opt_ops.cli.shared.standing import heartbeat_at, silent_nodes
from opt_ops.cli.shared.views import UNREADABLE, by_lineage
from opt_ops.core.health import HEALTH_TABLE
from opt_ops.core.health.explain import described, look_up, look_up_line
from opt_ops.core.state.fold import replay
from opt_ops.core.text import age, iso
from opt_ops.errors import NotFound, UsageError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import Watch

app = typer.Typer(no_args_is_help=True, help="Show, test, exclude and allow nodes.")
app.command(cls=node_check.Plugin)(node_check.check)
app.command()(node_ledger.ledger)

NodeArgument = Annotated[
    str | None, typer.Argument(metavar="NODE", help="Name of the node.", autocompletion=complete_node)
]

_COLUMNS = [
    Column("NODE", "node"),
    Column("VERDICT", "shown"),
    Column("REASON", "reason"),
    Column("HELD", "held"),
    Column("RUNS", "runs"),
    Column("STANDBY", "standby", right=True),
    Column("EXCLUDED", "excluded_by"),
    Column("DRAIN", "drain"),
    Column("SINCE", "age", right=True),
    Column("HEARD", "heard_age", right=True),
    Column("SOURCE", "source", wide=True),
]


@app.command("list")
def list_(
    identifier: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Lineage. [default: the newest that lives, else the newest]",
            autocompletion=complete_id,
        ),
    ] = "",
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """List the nodes of a lineage with their verdicts.

    Each verdict has a source.

    VERDICT has a question mark where nothing was heard of a held node in the last 30 seconds, or where no daemon
    watches. STANDBY is how many warm ranks wait there, HEARD the age of its last heartbeat. Without ID, the exit code
    is 5 if a lineage cannot be read.

    Example: opt-ops node list 12 -o wide
    """
    unreadable: dict[str, str] = {}
    if identifier:
        lineage = find_lineage(identifier)
    else:
        folders = site_lineages()
        readable, unreadable = by_lineage(folders, lambda path: Lineage(path, lineages.state(path)))
        living = [each for each in readable if not each.state.ended]
        lineage = next(iter([*living[-1:], *readable[-1:]]), None)
        if lineage is not None:
            say(f"lineage {lineage.name}")
        elif not unreadable:
            raise no_lineage()
    watch = watch_now()
    rows = _rows(lineage, watch) if lineage is not None else []
    rows += [
        {"node": None, "lineage": name, "verdict": UNREADABLE, "shown": UNREADABLE, "reason": why}
        for name, why in unreadable.items()
    ]
    columns = [Column("LINEAGE", "lineage"), *_COLUMNS] if unreadable else _COLUMNS
    show("opt-ops/node-list/1", rows, columns, output, header=header)
    watcher = watch.over(lineage.name) if lineage is not None and not lineage.state.ended else None
    if lineage is not None and watcher is not None and not watcher.watched:
        say(f"Lineage {lineage.name}: {watcher.why}. The verdicts are not newer than that.")
        say(f"  next: {watcher.next}")
    leave_if_unreadable(unreadable)


def _rows(lineage: Lineage, watch: Watch) -> list[dict[str, Any]]:
    state, now = lineage.state, watch.now
    held = state.held
    used = state.attempt.nodes if state.attempt and state.attempt.live else ()
    silent = silent_nodes(lineage.path, state, now)
    watched = state.ended or watch.over(lineage.name).watched
    evaluation = state.evaluation
    rows: list[dict[str, Any]] = []
    for node in state.nodes.values():
        attempt = state.attempt.name if state.attempt and node.name in used else None
        evaluates = evaluation.checkpoint if evaluation and evaluation.intended.node == node.name else None
        heard = heartbeat_at(lineage.path / "health" / f"{node.name}.jsonl")
        doubtful = not state.ended and (node.name in silent or not watched)
        rows.append(
            {
                "node": node.name,
                "lineage": lineage.name,
                "verdict": str(node.verdict),
                "shown": f"{node.verdict}?" if doubtful else str(node.verdict),
                "reason": node.reason,
                "source": node.source,
                "held": node.name in held,
                "attempt": attempt,
                "evaluates": evaluates,
                "runs": attempt or (f"evaluates {evaluates}" if evaluates else None),
                "standby": node.standby or None if node.name in held else None,
                "excluded_by": node.excluded_by,
                "drain": node.drain,
                "since": iso(node.at) if node.at else None,
                "age": age(now - node.at) if node.at else None,
                "heard_at": iso(heard),
                "heard_age": None if heard is None else age(now - heard),
                "silent_seconds": round(silent[node.name], 1) if node.name in silent else None,
                "evidence": dict(node.evidence),
            }
        )
    return rows


@app.command()
def explain(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="REASON", help="A reason code, or xid 94, or sxid 12028.")
    ] = None,
    line: Annotated[
        str | None, typer.Option("--line", metavar="TEXT", help="A line of the kernel log, with or without prefixes.")
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="NAME", help="With --line: product name of the GPU.")
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Explain a reason code or a kernel log error.

    It has a verdict, an action and a source.

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
            hint = "`opt-ops node list` and `opt-ops node check` print reason codes"
            raise NotFound(f"the health table has no {' '.join(what or ())}", hint)
    if output in (Format.TABLE, Format.WIDE):
        lines = [{"field": name.replace("_", " "), "value": row[name]} for row in rows for name in row]
        show("", lines, [Column("FIELD", "field"), Column("VALUE", "value")], output, header=False)
    else:
        show("opt-ops/node-explain/1", rows, [Column("REASON", "reason")], output)


@app.command()
@with_request_options()
def exclude(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    name: NodeArgument = None,
    reason: ReasonOption = "excluded by hand",
) -> None:
    """Exclude a node: no attempt of the lineage starts there.

    Slurm drains it where that is permitted.

    A running attempt stays on the node until `opt-ops run resume` or the next recovery moves it.

    Example: opt-ops node exclude 12 n031 --reason "fan"
    """
    identifier, name = split_id(identifier, name, "opt-ops node exclude 12 n031", quiet=options.quiet)
    request = PendingRequest(find_lineage(identifier), "exclude", {"node": name, "reason": reason}, options)
    request.send(f"Exclude {name}, and drain it?")


@app.command()
@with_request_options()
def allow(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    name: NodeArgument = None,
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
    identifier, name = split_id(identifier, name, "opt-ops node allow 12 n031", quiet=options.quiet)
    path = lineage_folder(identifier)
    entries = lineages.entries(path)
    lineage = Lineage(path, replay(entries))
    for line in node_ledger.why_excluded(lineage.state, entries, name):
        say(line, options.quiet)
    known = lineage.state.nodes.get(name)
    tested = {}
    if retest and known is not None and known.excluded_by:
        node_check.retest(lineage, name, known.excluded_at)
        tested = {"retested": True}
    question = f"Allow attempts on {name} again{'' if retest else ', without a test (--retest)'}?"
    PendingRequest(lineage, "allow", {"node": name, "reason": reason, **tested}, options).send(question)
