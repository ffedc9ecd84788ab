"""`opt-ops pending`: what waits for your answer."""

from __future__ import annotations

from typing import Annotated

import typer

from opt_ops.cli.shared import proposals
from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    OptionalIdArgument,
    QuietOption,
    lineage_folder,
    site_lineages,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.views import by_lineage
from opt_ops.core.values import ProposalStatus
from opt_ops.runfolder import lineages

_COLUMNS = [
    Column("PROPOSAL", "proposal"),
    Column("DEADLINE", "deadline"),
    Column("THEN", "then"),
    Column("STATUS", "status", wide=True),
    Column("BY", "by", wide=True),
    Column("WHAT", "text"),
    Column("WHY", "why"),
]


def pending(
    identifier: OptionalIdArgument = "",
    everything: Annotated[bool, typer.Option("-a", "--all", help="Also proposals that were answered.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """List the proposals that wait for your answer.

    A lineage makes them in ask mode (`opt-ops run ask`). The exit code is 5 if one is open. THEN says what happens at
    the deadline without an answer.

    Examples:
      opt-ops pending
      opt-ops pending 12 --all -o json
    """
    paths = [lineage_folder(identifier)] if identifier else site_lineages()
    found, unreadable = by_lineage(paths, lambda path: proposals.rows(path, lineages.state(path), everything))
    rows = [row for each in found for row in each]
    waits = [row["proposal"] for row in rows if row["status"] == ProposalStatus.OPEN]
    if rows or output is not Format.TABLE:
        show("opt-ops/proposals/1", rows, _COLUMNS, output, header=header)
    for name, why in unreadable.items():
        say(f"Lineage {name} cannot be read: {why}\n  next: opt-ops run show {name}")
    if waits:
        say(f"  next: opt-ops run approve {waits[0]}, or opt-ops run decline {waits[0]}", quiet)
    elif not rows:
        say("No proposal waits for an answer.", quiet)
    if waits or unreadable:
        raise typer.Exit(5)
