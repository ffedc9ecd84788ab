"""`opt-ops events`, and the commands of `opt-ops run` that only read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.queue import queue
from opt_ops.cli.run.explain_lines import explanation_lines
from opt_ops.cli.shared import views
from opt_ops.cli.shared.help import RunCommands
from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    IdArgument,
    Lineage,
    QuietOption,
    complete_kind,
    find_lineage,
    lineage_folder,
    require_known,
    seconds_of,
    watch_now,
)
from opt_ops.cli.shared.output import Column, Format, say, show, text, wrapped
from opt_ops.core.events import KINDS, kind_of
from opt_ops.core.state import in_place
from opt_ops.core.state.model import State
from opt_ops.core.text import printable
from opt_ops.core.values import Driver
from opt_ops.errors import UsageError
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, cls=RunCommands, help="Start, watch, change and stop lineages and their runs.")


app.command("list", help=(queue.__doc__ or "").replace("opt-ops q", "opt-ops run list"))(queue)


@app.command()
def suggest(
    identifier: IdArgument,
    repair_hours: Annotated[
        float, typer.Option(min=0.1, help="Time from a node's failure until it is repaired.")
    ] = 15.0,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Recommend a save interval and a number of spares.

    Both come from the lineage's own failures and save times.

    Example: opt-ops run suggest 12 --repair-hours 46
    """
    lineage = find_lineage(identifier)
    row = views.suggestion(lineage.path, lineage.state, repair_hours, time.time())
    missing = list(views.not_suggested(row))
    if output in (Format.TABLE, Format.WIDE):
        row = {name: "not known" if value is None else value for name, value in row.items()}
    show("opt-ops/suggestion/1", [row], views.SUGGESTION_COLUMNS, output)
    if missing:
        say("too little has happened to advise", quiet)
    for why in missing:
        say(f"  note: {why}", quiet)


@app.command("show")
def show_(
    identifier: IdArgument,
    check: Annotated[
        bool, typer.Option("--check", help="Print only what is wrong now. The exit code is 5 if anything is.")
    ] = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Show a lineage: progress, runs, attempts, incidents, logs.

    Examples:
      opt-ops run show 12 -o json
      opt-ops run show 12 --check
    """
    if check:
        lineage = find_lineage(identifier)
        require_known(identifier, lineage)
        _check(lineage, output, quiet)
        return
    from chronicles.record import load
    from chronicles.report.encode import incident_row
    from chronicles.report.incident import incidents

    path = lineage_folder(identifier)
    record = load(path, telemetry=False)
    require_known(identifier, Lineage(path, record.state))
    watch = watch_now()
    view = views.lineage_view(path, record.state, [*map(incident_row, incidents(record))], watch)
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/run/1", [view], [], output)
        return
    _head(path, record.state, view)
    print("\nRUNS")
    show("", [views.in_words(row) for row in view["runs"]], views.RUN_COLUMNS, output)
    print("\nATTEMPTS")
    show("", view["attempts"], views.ATTEMPT_COLUMNS, output)
    if view["planned"]:
        print("\nPLANNED CHANGES")
        show("", view["planned"], views.PLANNED_COLUMNS, output)
    if view["incidents"]:
        print("\nINCIDENTS")
        show("", [views.in_words(row) for row in view["incidents"]], views.INCIDENT_COLUMNS, output)
    unwatched = watch.over(path.name) if view["lineage"]["watched"] is False else None
    if unwatched:
        say(printable(unwatched.why), quiet)
    say(f"  next: {unwatched.next if unwatched else f'opt-ops explain {identifier}'}", quiet)


def _head(path: Path, state: State, view: Mapping[str, Any]) -> None:
    """Print what is known of the lineage as a whole."""
    row = view["lineage"]
    print(printable(f"lineage {row['lineage']}  {row['shown']}  {row['reason']}".rstrip()))
    if state.driver is Driver.SHADOW:
        print("  only watched (shadow): another launcher runs it. Nothing is touched, and decisions are advice")
    print(printable(f"  recipe {row['recipe'] or '-'} {' '.join(row['settings'])}".rstrip()))
    for line in _origin(row):
        print(printable(f"  {line}"))
    last = f"{row['step_age']} ago" if row["step_age"] else None
    print(f"  step {text(row['progress'])}   last step {text(last)}   checkpoint {text(row['checkpoint'])}")
    print(f"  loss {text(row['loss'])}   lr {text(row['lr'])}")
    if row["standby"] is not None:
        print(f"  generation {row['generation']}   {in_place.standby(row['standby'])}")
    if row["evaluates"] is not None:
        on = row["evaluates_on"]
        print(f"  evaluates {row['evaluates']} {f'on {on}' if on else 'beside the daemon'}")
    for each in row["findings"]:
        if each["why"] not in row["reason"]:
            print(printable(f"  {each['finding']}: {each['why']}"))
    if view["valid"]:
        losses = "   ".join(f"{name} {text(loss)}" for name, loss in view["valid"]["losses"].items())
        print(printable(f"  validation at step {view['valid']['step']}   {losses}"))
    for each in view["left_out"]:
        print(printable(f"  {each['text']} ({each['file']})"))
    print(f"  folder {path}")


def _origin(row: Mapping[str, Any]) -> Iterator[str]:
    """Where a lineage comes from, and what came from it."""
    if row["init_from"]:
        yield f"first weights {row['init_from']}"
    if parent := row["parent"]:
        yield f"fork of {parent['run']} at step {parent['step']}: {parent['checkpoint']}"
    if row["children"]:
        yield f"forked as {', '.join(row['children'])}"


def _check(lineage: Lineage, output: Format, quiet: bool) -> None:
    found = views.findings(lineage.path, lineage.state, watch_now())
    columns = [Column("FINDING", "finding"), Column("WHY", "why"), Column("NEXT", "next")]
    if found or output not in (Format.TABLE, Format.WIDE):
        show("opt-ops/run-check/1", found, columns, output)
    if found:
        raise typer.Exit(5)
    say(f"Nothing is wrong. Lineage {lineage.name} is {lineage.state.status}.", quiet)


@app.command()
def explain(identifier: IdArgument, output: FormatOption = Format.TABLE) -> None:
    """Explain each incident: evidence, rule, action and proof.

    Example: opt-ops run explain 12.01
    """
    from chronicles.logbook.story.afterthoughts import afterthoughts, on
    from chronicles.record import load
    from chronicles.report.build import build
    from chronicles.report.encode import encode, explanation

    path = lineage_folder(identifier)
    record = load(path, telemetry=False)
    require_known(identifier, Lineage(path, record.state))
    first_weights = record.state.lineage.init_from if record.state.lineage else None
    report = build(record, lemons=False)
    concerned = [incident for incident in report.incidents if views.concerns(incident, identifier)]
    thoughts = afterthoughts(record, report)
    if output in (Format.JSON, Format.JSONL):
        items = [
            {**explanation(incident), "later": encode(on(incident.incident, thoughts)), "init_from": first_weights}
            for incident in concerned
        ]
        show("opt-ops/explanation/1", items, [], output)
        return
    watched = record.state.driver is Driver.SHADOW
    if watched:
        print(f"{identifier}: {views.WATCHED}. Every action is advice, and nothing is touched.\n")
    if first_weights:
        print(printable(f"lineage {path.name} began with the weights of {first_weights}\n"))
    for incident in concerned:
        for line in explanation_lines(incident, thoughts, watched=watched):
            print("\n".join(wrapped(printable(line), 12)))
        print()
    if not concerned:
        print(f"{identifier} has no incident")


def events(
    identifier: IdArgument,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only events of this kind. May be given several times.", autocompletion=complete_kind),
    ] = None,
    since: Annotated[str, typer.Option(help="Only events of the last 90s, 15m, 2h, 3d or 1w.")] = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new events until Ctrl-C.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """Print what was observed, decided and done: the journal.

    Examples:
      opt-ops events 12 --kind recovery_decided --kind incident_closed
      opt-ops events 12 --since 2h -f
    """
    for name in kind or []:
        _require_kind(name)
    path = lineage_folder(identifier)
    after = time.time() - seconds_of("--since", since) if since else 0.0
    told = views.EventRows()
    while True:
        entries = lineages.entries(path)
        rows = told.of(entries, lambda entry: entry.ts >= after and (not kind or kind_of(entry.event) in kind))
        if output is Format.WIDE:
            rows = [views.with_fields(row) for row in rows]
        if rows or not follow or output is Format.JSON:
            show("opt-ops/events/1", rows, views.EVENT_COLUMNS, output, header=header)
        if not follow:
            return
        header = False
        time.sleep(1.0)


def _require_kind(name: str) -> None:
    if name not in KINDS:
        near = get_close_matches(name, KINDS) or [known for known in KINDS if name.lower() in known][:3]
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        hint = f"for example --kind {near[0]}" if near else f"the kinds: {', '.join(sorted(KINDS))}"
        raise UsageError(f"--kind {name}: no such kind{meant}", hint)
