"""`opt-ops node ledger`: which GPUs and nodes fail more often than others, for the time that they were used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli import node
from opt_ops.cli.options import FormatOption, HeaderOption, OptionalIdArgument, lineage_folder, settings
from opt_ops.cli.output import Column, Format, show
from opt_ops.core.health.lemons import Record, merged, parts, records
from opt_ops.core.text import age, iso, printable
from opt_ops.runfolder import lineages

_COLUMNS = [
    Column("PART", "part"),
    Column("NODE", "node"),
    Column("SERIAL", "serial", wide=True),
    Column("HOURS", "hours", right=True),
    Column("FAILURES", "failures", right=True),
    Column("EXPECTED", "expected", right=True),
    Column("SCORE", "score", right=True),
    Column("LEMON", "lemon"),
    Column("LAST", "last"),
    Column("EXCLUDED", "excluded_by"),
]


@node.app.command()
def ledger(
    identifier: OptionalIdArgument = "",
    everything: Annotated[bool, typer.Option("--all", help="Those that never failed, too.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """GPUs, by UUID, and nodes that failed within 28 days, with the hours of attempts on them; the oddest first.

    EXPECTED is how often the part would have failed at the others' rate; SCORE 3 means that so many failures or more
    have a chance of 1 in 1,000. A lemon failed twice or more, and against the odds: docs/node-check.md.

    Example: opt-ops node ledger -o wide
    """
    folders = [lineage_folder(identifier)] if identifier else lineages.folders(settings.config.runs)
    journals = [lineages.entries(path) for path in folders]
    now = max((entries[-1].ts for entries in journals if entries), default=0.0)
    excluded = {name: each.excluded_by for path in folders for name, each in lineages.state(path).nodes.items()}
    found = records(merged(parts(entries) for entries in journals), now)
    rows = [
        row_of(each) | {"excluded_by": excluded.get(each.part.node)} for each in found if everything or each.failures
    ]
    show("opt-ops/node-ledger/1", rows, _COLUMNS, output, header=header)


def row_of(record: Record) -> dict[str, Any]:
    """A line of the ledger as plain values."""
    part, last = record.part, record.failures[-1] if record.failures else None
    causes = [
        {"at": iso(each.at), "incident": each.incident, "kind": each.kind, "cause": each.cause, "node": each.node}
        for each in record.failures
    ]
    return {
        "part": part.key,
        "kind": part.kind,
        "node": part.node,
        "serial": part.serial,
        "name": part.name,
        "hours": record.hours,
        "failures": len(record.failures),
        "expected": record.expected,
        "score": record.score,
        "lemon": record.lemon,
        "last": last.cause if last else None,
        "incidents": causes,
    }


def why_out(path: Path, name: str) -> list[str]:
    """What is known against a node that is to return, for whoever decides that."""
    state = lineages.state(path)
    known = state.nodes.get(name)
    if known is None or not known.excluded_by:
        return []
    by = "an operator" if known.excluded_by == "operator" else known.excluded_by
    incident = state.incidents.get(known.excluded_by)
    cause = incident.cause if incident else f"{known.verdict}, {known.reason} ({known.source})"
    lines = [f"  {name} was taken out by {by}, {age(time.time() - known.excluded_at)} ago: {printable(cause)}"]
    entries = lineages.entries(path)
    for each in records(parts(entries), entries[-1].ts):
        if each.part.node == name and each.failures:
            what = f"{name}" if each.part.kind == "node" else f"{each.part.key}, serial {each.part.serial or 'unknown'}"
            often = f"{len(each.failures)} failures in {each.hours:.0f} hours of the last 28 days"
            lines.append(f"  {printable(what)}: {often}{'; a lemon' if each.lemon else ''}")
    return lines
