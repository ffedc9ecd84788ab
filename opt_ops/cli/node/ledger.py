"""`opt-ops node ledger`: GPUs and nodes that fail more often than chance explains, per hour of use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    OptionalIdArgument,
    QuietOption,
    leave_if_unreadable,
    lineage_folder,
    site_lineages,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.views import UNREADABLE, by_lineage
from opt_ops.core.events import Entry
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.health.lemons import Record, merged, parts, records
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
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


def ledger(
    identifier: OptionalIdArgument = "",
    everything: Annotated[bool, typer.Option("--all", help="Also parts that never failed.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """List GPUs and nodes that failed in the last 28 days.

    The highest score comes first.

    HOURS are hours of attempts on the part. EXPECTED is how often it would have failed at the rate of all others.
    SCORE 3 means: by chance, this many failures happen to 1 part in 1,000. A lemon failed at least twice, with a high
    score. docs/node-check.md has the rules. The exit code is 5 if a lineage cannot be read: its row has the reason, and
    its failures are not counted.

    Example: opt-ops node ledger -o wide
    """
    folders = [lineage_folder(identifier)] if identifier else site_lineages()
    if identifier:  # an error is that of the command
        journals, unreadable = [lineages.entries(folders[0])], {}
    else:
        journals, unreadable = by_lineage(folders, lineages.entries)
    now = max((entries[-1].ts for entries in journals if entries), default=0.0)
    states = [replay(entries) for entries in journals]
    excluded = {name: each.excluded_by for state in states for name, each in state.nodes.items()}
    found = records(merged(parts(entries) for entries in journals), now)
    rows = [_row(each) | {"excluded_by": excluded.get(each.part.node)} for each in found if everything or each.failures]
    rows += [
        {"part": f"lineage {name}", "kind": "unreadable", "lineage": name, "state": UNREADABLE, "last": why}
        for name, why in unreadable.items()
    ]
    if rows or output not in (Format.TABLE, Format.WIDE):
        show("opt-ops/node-ledger/1", rows, _COLUMNS, output, header=header)
    if not any(each.failures for each in found) and not unreadable:
        known = f"{len(found)} part{'' if len(found) == 1 else 's'} of {len(journals)} lineages on record"
        say(f"nothing failed in 28 days: {known}. --all lists every part", quiet)
    leave_if_unreadable(unreadable)


def _row(record: Record) -> dict[str, Any]:
    """A row of the ledger as plain JSON values."""
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


def why_excluded(state: State, entries: Sequence[Entry], name: str) -> list[str]:
    """Why a node is excluded, and the failures on record against it and its GPUs; nothing if it is not excluded."""
    known = state.nodes.get(name)
    if known is None or not known.excluded_by:
        return []
    by = "an operator" if known.excluded_by == FailureClass.OPERATOR else known.excluded_by
    incident = state.incidents.get(known.excluded_by)
    cause = incident.cause if incident else f"{known.verdict}, {known.reason} ({known.source})"
    lines = [f"  {name} was excluded by {by}, {age(time.time() - known.excluded_at)} ago: {printable(cause)}"]
    for each in records(parts(entries), entries[-1].ts):
        if each.part.node == name and each.failures:
            what = f"{name}" if each.part.kind == "node" else f"{each.part.key}, serial {each.part.serial or 'unknown'}"
            count = f"{len(each.failures)} failure{'s' if len(each.failures) > 1 else ''}"
            often = f"{count} in {each.hours:.0f} hours of the last 28 days"
            lines.append(f"  {printable(what)}: {often}{'; a lemon' if each.lemon else ''}")
    return lines
