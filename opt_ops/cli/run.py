"""`opt-ops q`, `opt-ops run …`, `opt-ops events`: lineages and their runs."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from opt_ops.cli import views
from opt_ops.cli.options import (
    FormatOption,
    HeaderOption,
    IdArgument,
    QuietOption,
    complete_kind,
    daemon_alive,
    lineage_folder,
    must_know,
    settings,
)
from opt_ops.cli.output import Column, Format, say, show, text, wrapped
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.core.text import printable
from opt_ops.errors import UsageError
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, help="Start, look at and stop runs.")


def queue(
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """All lineages, one line each.

    Example: opt-ops q -o wide
    """
    runs, now = settings.config.runs, time.time()
    rows = [views.lineage_row(path, now) for path in lineages.folders(runs)]
    columns = [
        Column("LINEAGE", "lineage"),
        Column("RUN", "run"),
        Column("STATE", "state"),
        Column("JOB", "job"),
        Column("NODES", "nodes", right=True),
        Column("STEP", "progress", right=True),
        Column("LOSS", "loss", right=True),
        Column("LR", "lr", wide=True, right=True),
        Column("WPS", "wps", wide=True, right=True),
        Column("TFLOPS", "tflops", wide=True, right=True),
        Column("CKPT", "checkpoint", right=True),
        Column("RST", "restarts", right=True),
        Column("SINCE", "age", right=True),
        Column("REASON", "reason"),
    ]
    show("opt-ops/run-list/1", rows, columns, output, header=header)
    if not rows:
        say("no lineages yet\n  next: opt-ops run start opt-tiny")


@app.command("list")
def list_(output: FormatOption = Format.TABLE, header: HeaderOption = True) -> None:
    """All lineages, one line each; the same as `opt-ops q`."""
    queue(output, header)


@app.command()
def suggest(
    identifier: IdArgument,
    repair_hours: Annotated[float, typer.Option(min=0.1, help="From a node's failure until it is back.")] = 15.0,
    output: FormatOption = Format.TABLE,
) -> None:
    """How often to save and how many spares to hold, by this lineage's own failures and the cost of its saves.

    Example: opt-ops run suggest 12 --repair-hours 46
    """
    path = lineage_folder(identifier)
    row = views.suggestion(path, lineages.state(path), repair_hours, time.time())
    show("opt-ops/suggestion/1", [row], views.SUGGESTION_COLUMNS, output)


@app.command("show")
def show_(
    identifier: IdArgument,
    check: Annotated[
        bool, typer.Option("--check", help="Only what is wrong with it now. Leaves with 5 when something is.")
    ] = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """A lineage: where it stands, its runs and attempts, its incidents, and where their logs are.

    Examples:
      opt-ops run show 12 -o json
      opt-ops run show 12 --check
    """
    path = lineage_folder(identifier)
    must_know(identifier, path, state := lineages.state(path))
    if check:
        _check(path.name, state, output, quiet)
        return
    now = time.time()
    view = views.lineage_view(path, state, now)
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/run/1", [view], [], output)
        return
    row = view["lineage"]
    print(printable(f"lineage {row['lineage']}  {row['state']}  {row['reason']}".rstrip()))
    print(printable(f"  recipe {row['recipe']} {' '.join(row['settings'])}".rstrip()))
    standing = {"step": row["progress"], "loss": row["loss"], "lr": row["lr"], "checkpoint": row["checkpoint"]}
    print("  " + "   ".join(f"{name} {text(value)}" for name, value in standing.items()))
    if view["valid"]:
        losses = "   ".join(f"{name} {text(loss)}" for name, loss in view["valid"]["losses"].items())
        print(printable(f"  validation at step {view['valid']['step']}   {losses}"))
    print(f"  folder {path}")
    print("\nRUNS")
    show("", view["runs"], views.RUN_COLUMNS, output)
    print("\nATTEMPTS")
    show("", view["attempts"], views.ATTEMPT_COLUMNS, output)
    if view["incidents"]:
        print("\nINCIDENTS")
        show("", view["incidents"], views.INCIDENT_COLUMNS, output)
    say(f"  next: opt-ops run explain {identifier}", quiet)


def _check(name: str, state: State, output: Format, quiet: bool) -> None:
    found = views.findings(name, state, daemon_alive(settings.config.runs))
    columns = [Column("FINDING", "finding"), Column("WHY", "why"), Column("NEXT", "next")]
    if found or output not in (Format.TABLE, Format.WIDE):
        show("opt-ops/run-check/1", found, columns, output)
    if found:
        raise typer.Exit(5)
    say(f"nothing is wrong; it is {state.status}", quiet)


@app.command()
def explain(identifier: IdArgument, output: FormatOption = Format.TABLE) -> None:
    """Why the supervisor did what it did: evidence, rule, action, budget and proof of every incident.

    Example: opt-ops run explain 12.01
    """
    path = lineage_folder(identifier)
    entries = lineages.entries(path)
    must_know(identifier, path, state := replay(entries))
    concerned = [i for i in state.incidents.values() if views.concerns(state, i, identifier)]
    told = [views.explanation(state, incident, entries) for incident in concerned]
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/explanation/1", told, [], output)
        return
    for item in told:
        for line in views.explanation_lines(item):
            print("\n".join(wrapped(printable(line), 12)))
        print()
    if not told:
        print(f"{identifier}: nothing has happened that called for a decision")


def events(
    identifier: IdArgument,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind; may be repeated.", autocompletion=complete_kind)
    ] = None,
    since: Annotated[str, typer.Option(help="Only from the last 90s, 15m, 2h or 3d.")] = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what comes.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """The journal: what was seen, decided and done.

    Examples:
      opt-ops events 12 --kind recovery_decided --kind incident_closed
      opt-ops events 12 --since 2h -f
    """
    path = lineage_folder(identifier)
    after = time.time() - _seconds(since) if since else 0.0
    seen = 0
    while True:
        rows = [views.event_row(entry) for entry in lineages.entries(path) if entry.seq > seen and entry.ts >= after]
        seen = max([seen, *(row["seq"] for row in rows)])
        rows = [row for row in rows if not kind or row["kind"] in kind]
        if rows or not follow or output is Format.JSON:
            show("opt-ops/events/1", rows, views.EVENT_COLUMNS, output, header=header)
        if not follow:
            return
        header = False
        time.sleep(1.0)


def _seconds(span: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", span)
    if match is None:
        raise UsageError(f"--since {span}: not of the form 90s, 15m, 2h or 3d", "for example --since 2h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
