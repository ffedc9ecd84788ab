"""`opt-ops node list|explain`: the nodes that a lineage holds, and the table that they are judged by."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from opt_ops.cli.options import FormatOption, HeaderOption, complete_id, lineage_folder, newest_lineage
from opt_ops.cli.output import Column, Format, show
from opt_ops.core.health import HEALTH_TABLE
from opt_ops.core.health.explain import described, look_up
from opt_ops.core.text import age, iso
from opt_ops.errors import NotFound
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, help="The health of nodes.")

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
    """The nodes of a lineage with their verdicts, and who says so.

    Example: opt-ops node list 12 -o wide
    """
    path = lineage_folder(identifier) if identifier else newest_lineage()
    state = lineages.state(path)
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
    what: Annotated[list[str], typer.Argument(metavar="REASON", help="A reason, or: xid 94, sxid 12028.")],
    output: FormatOption = Format.TABLE,
) -> None:
    """What follows from a reading or an error in the kernel log, why, and who decides otherwise.

    Examples:
      opt-ops node explain xid 94
      opt-ops node explain sxid 12028
      opt-ops node explain remap_pending -o json
    """
    rows = [{**described(row), "table": HEALTH_TABLE} for row in look_up(what)]
    if not rows:
        raise NotFound(f"the health table has no {' '.join(what)}", "docs/health.md lists all reasons")
    if output in (Format.TABLE, Format.WIDE):
        lines = [{"field": name.replace("_", " "), "value": row[name]} for row in rows for name in row]
        show("", lines, [Column("FIELD", "field"), Column("VALUE", "value")], output, header=False)
    else:
        show("opt-ops/node-explain/1", rows, [Column("REASON", "reason")], output)
