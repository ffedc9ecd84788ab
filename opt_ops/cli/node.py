"""`opt-ops node …`: the nodes that a lineage holds, and a check of this one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import Annotated, Any

import typer

from opt_ops import lineages
from opt_ops.cli.common import FormatOption, HeaderOption, lineage_folder, newest_lineage, settings
from opt_ops.core.health import HEALTH_TABLE, Heartbeat, judge
from opt_ops.core.health.explain import described, look_up
from opt_ops.core.values import Verdict
from opt_ops.errors import NotFound, OptOpsError
from opt_ops.render import Column, Format, age, iso, say, show

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

# Nagios' plugin codes, which Slurm's HealthCheckProgram and most site scripts understand.
_NAGIOS = {Verdict.HEALTHY: 0, Verdict.SUSPECT: 1, Verdict.BAD: 2, Verdict.UNKNOWN: 3}

_READ_SECONDS = 25.0  # Slurm kills a health check after 60


@app.command("list")
def list_(
    identifier: Annotated[str, typer.Argument(metavar="[ID]", help="Lineage. [default: the newest]")] = "",
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
def check(
    nagios: Annotated[
        bool, typer.Option(help="One line and Nagios' exit codes: 0 ok, 1 warning, 2, 3 unknown.")
    ] = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Read this machine's GPUs now, and judge them by the table of docs/health.md.

    Leaves with 0 when healthy and 5 otherwise; unknown is not healthy.

    Example: opt-ops node check --nagios
    """
    try:
        reading = _read()
        judgement = judge(reading, settings.config.health.gpus_per_node)
    except (OptOpsError, OSError, subprocess.CalledProcessError) as error:
        if not nagios:
            raise
        print(f"UNKNOWN - opt-ops node check failed: {error}")
        raise typer.Exit(3) from error
    row = {
        "node": socket.gethostname(),
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "source": judgement.source,
        "gpus": len(reading.gpus),
        "evidence": dict(judgement.evidence),
    }
    if nagios:
        print(f"{judgement.verdict.upper()} - {judgement.reason} ({judgement.source}), {len(reading.gpus)} GPUs")
        raise typer.Exit(_NAGIOS[judgement.verdict])
    columns = [Column(name.upper(), name) for name in ("node", "verdict", "reason", "gpus", "source")]
    show("opt-ops/node-check/1", [row], columns, output)
    if judgement.verdict is not Verdict.HEALTHY:
        say(f"  next: opt-ops node explain {judgement.reason}")
        raise typer.Exit(5)


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


def _read() -> Heartbeat:
    from opt_ops.adapters.runfolder import heartbeat_of

    reading: dict[str, Any]
    command = [sys.executable, "-m", "opt_ops.adapters.nvml", "--once"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_READ_SECONDS, check=True)
        reading = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        reading = {"nvml": "hung", "gpus": []}
    host = socket.gethostname()
    return heartbeat_of({"node": host, "host": host, "ts": time.time(), **reading})
