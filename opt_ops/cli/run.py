"""`opt-ops q`, `opt-ops run …`, `opt-ops events`: lineages and their runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops import lineages, views
from opt_ops.cli.asking import Asked
from opt_ops.cli.common import (
    AuthorOption,
    DryRunOption,
    FormatOption,
    HeaderOption,
    IdArgument,
    QuietOption,
    YesOption,
    ask_daemon,
    author,
    complete_kind,
    lineage_folder,
    settings,
    show_answer,
)
from opt_ops.core.run import State
from opt_ops.errors import NotFound, UsageError
from opt_ops.render import Column, Format, printable, say, show, text

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
        Column("CKPT", "checkpoint", right=True),
        Column("RST", "restarts", right=True),
        Column("SINCE", "age", right=True),
        Column("REASON", "reason"),
    ]
    show("opt-ops/run-list/1", rows, columns, output, header=header)
    if not rows:
        say("no lineages yet\n  next: opt-ops run start opt-tiny")


def _corpus(given: str) -> str:
    """As it was given, with the whole path: trainers are started elsewhere."""
    if Path(given).exists():
        return str(Path(given).absolute())
    found = re.fullmatch(r"([\w.-]+=)?(.+?)(:[\d.]+)?", given)
    if not found or not Path(found[2]).exists():
        raise UsageError(f"--data {given}: {found[2] if found else given} does not exist")
    return f"{found[1] or ''}{Path(found[2]).absolute()}{found[3] or ''}"


@app.command("list")
def list_(output: FormatOption = Format.TABLE, header: HeaderOption = True) -> None:
    """All lineages, one line each; the same as `opt-ops q`."""
    queue(output, header)


@app.command()
def start(
    recipe: Annotated[str, typer.Argument(help="The trainer's recipe, such as opt-tiny or opt-125m.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH[:WEIGHT]",
            help="JSONL file with a `text` field, or a folder of them; with weights, corpora that are mixed.",
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or a folder with GPT-2's files.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train. [default: configuration]")] = None,
    spares: Annotated[int | None, typer.Option(min=0, help="Nodes held beside them.")] = None,
    min_nodes: Annotated[
        int, typer.Option(min=0, help="Rather train on as few nodes than wait. [default: never on fewer than --nodes]")
    ] = 0,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on each node.")] = None,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Start a lineage: the daemon holds nodes for it, trains it to its last step, and recovers it on the way.

    Examples:
      opt-ops run start opt-tiny --set steps=400
      opt-ops run start opt-125m --data corpus/ --nodes 4 --spares 1 --ranks 8
      opt-ops run start opt-125m --data wiki=wiki/:0.3 --data books=books/:0.7
    """
    for setting in set_ or []:
        if not re.fullmatch(r"[\w.]+=.*", setting):
            raise UsageError(f"--set {setting}: not of the form key=value", "python -m trainer --list-recipes")
    corpora = [_corpus(each) for each in data or []]
    if tokenizer and not tokenizer.exists():
        raise UsageError(f"{tokenizer} does not exist")
    config = settings.config
    default = config.shape
    shape = {
        "nodes": nodes or default.nodes,
        "spares": default.spares if spares is None else spares,
        "ranks_per_node": ranks or default.ranks_per_node,
        "min_nodes": min_nodes,
    }
    if min_nodes > shape["nodes"]:
        raise UsageError(f"--min-nodes {min_nodes} is more than --nodes {shape['nodes']}")
    arguments: dict[str, Any] = {
        "recipe": recipe,
        "settings": set_ or [],
        "data": corpora,
        "tokenizer": str(tokenizer.absolute()) if tokenizer else None,
        "shape": shape,
    }
    held = shape["nodes"] + shape["spares"]
    if dry_run:
        print(f"would start   {recipe} {' '.join(set_ or [])}".rstrip())
        print(f"would hold    {held} nodes ({config.scheduler}), {shape['spares']} of them spare")
        print(f"would train   {shape['nodes'] * shape['ranks_per_node']} ranks")
        return
    folder = lineages.create(config.runs)
    answer = ask_daemon(folder, author(by), "start", {"lineage": folder.name, **arguments}, quiet)
    if output in (Format.TABLE, Format.NAME):
        print(folder.name)
    else:
        show_answer(answer, output)
    say(f"  next: opt-ops run show {folder.name}", quiet)


@app.command()
def shadow(
    folder: Annotated[Path, typer.Argument(help="Where the training writes telemetry.jsonl and config.json.")],
    checkpoints: Annotated[Path | None, typer.Option(help="Where it saves its step-… folders.")] = None,
    name: Annotated[str, typer.Option(help="What the logbook calls it.")] = "shadow",
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Watch a training that another launcher runs: opt-ops decides as it would, says so, and touches nothing.

    `opt-ops run explain` and the logbook then tell what it would have done. docs/formats.md says what the training
    must write; without checkpoints of our format, rollbacks are foreseen from scratch.

    Example: opt-ops run shadow /shared/job-8842 --checkpoints /shared/job-8842/checkpoints
    """
    for path in [folder, *([checkpoints] if checkpoints else [])]:
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder")
    if dry_run:
        print(f"would watch   {folder.absolute()}\nwould touch   nothing")
        return
    path = lineages.create(settings.config.runs)
    run_folder = path / f"{path.name}.00"
    run_folder.mkdir()
    (run_folder / "a0").symlink_to(folder.absolute())
    if checkpoints:
        (run_folder / "checkpoints").symlink_to(checkpoints.absolute())
    arguments: dict[str, Any] = {
        "lineage": path.name,
        "recipe": name,
        "settings": [],
        "data": [],
        "tokenizer": None,
        "shape": {"nodes": 1, "spares": 0, "ranks_per_node": 1},
        "driver": "shadow",
    }
    answer = ask_daemon(path, author(by), "start", arguments, quiet)
    if output in (Format.TABLE, Format.NAME):
        print(path.name)
    else:
        show_answer(answer, output)
    say(f"  next: opt-ops run explain {path.name}", quiet)


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
def show_(identifier: IdArgument, output: FormatOption = Format.TABLE) -> None:
    """A lineage: where it stands, its runs and attempts, its incidents, and where their logs are.

    Example: opt-ops run show 12 -o json
    """
    path = lineage_folder(identifier)
    state, now = lineages.state(path), time.time()
    view = views.lineage_view(path, state, now)
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/run/1", [view], [], output)
        return
    row = view["lineage"]
    print(printable(f"lineage {row['lineage']}  {row['state']}  {row['reason']}".rstrip()))
    print(printable(f"  recipe {row['recipe']} {' '.join(row['settings'])}".rstrip()))
    standing = {"step": row["progress"], "loss": row["loss"], "lr": row["lr"], "checkpoint": row["checkpoint"]}
    print("  " + "   ".join(f"{name} {text(value)}" for name, value in standing.items()))
    print(f"  folder {path}")
    print("\nRUNS")
    show("", view["runs"], views.RUN_COLUMNS, output)
    print("\nATTEMPTS")
    show("", view["attempts"], views.ATTEMPT_COLUMNS, output)
    if view["incidents"]:
        print("\nINCIDENTS")
        show("", view["incidents"], views.INCIDENT_COLUMNS, output)
    say(f"  next: opt-ops run explain {identifier}")


@app.command()
def explain(identifier: IdArgument, output: FormatOption = Format.TABLE) -> None:
    """Why the supervisor did what it did: evidence, rule, action, budget and proof of every incident.

    Example: opt-ops run explain 12.01
    """
    path = lineage_folder(identifier)
    state = lineages.state(path)
    _known(identifier, path, state)
    told = [views.explanation(state, i) for i in state.incidents.values() if views.concerns(state, i, identifier)]
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/explanation/1", told, [], output)
        return
    for item in told:
        print("\n".join(printable(line) for line in views.explanation_lines(item)))
        print()
    if not told:
        print(f"{identifier}: nothing has happened that called for a decision")


@app.command()
def stop(
    identifier: IdArgument,
    reason: Annotated[str, typer.Option(help="Why, for the logbook.")] = "stopped by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Stop a lineage for good: its processes end, its nodes are given back, its checkpoints stay.

    Example: opt-ops run stop 12 --reason "wrong tokenizer"
    """
    path = lineage_folder(identifier)
    state = lineages.state(path)
    lost = views.lost_if_stopped(path, state)
    question = f"Stop lineage {path.name} ({state.status})? {lost} steps since the newest good checkpoint are lost."
    asked = Asked("stop", {"reason": reason}, question, yes, dry_run, output, quiet, by)
    asked.send(identifier, remark=f"would lose    {lost} steps since the newest good checkpoint")


@app.command()
def note(
    identifier: IdArgument,
    text: Annotated[str, typer.Argument(help="What you saw or think.")],
    correction: Annotated[
        bool, typer.Option("--correction", help="What the logbook says there is wrong; this is right.")
    ] = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Write a note into the logbook, under your name.

    A note on an incident (12-i003) or on another entry (12-e57, as in its link) stands below it; the entry stays.

    Examples:
      opt-ops run note 12.01 "data shard 17 was new here"
      opt-ops run note 12-i003 "it was the switch, not the GPU" --correction
    """
    path = lineage_folder(identifier)
    _known(identifier, path, lineages.state(path))
    asked = {"target": identifier, "text": text, "correction": correction}
    show_answer(ask_daemon(path, author(by), "note", asked, quiet), output)
    say(f"  next: opt-ops logbook open {path.name}", quiet)


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
        raise UsageError(f"--since {span}: not of the form 90s, 15m, 2h or 3d")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _known(identifier: str, path: Path, state: State) -> None:
    entry = re.fullmatch(r"\d+-e(\d+)", identifier)
    known = identifier in (path.name, *state.runs, *state.attempts, *state.incidents)
    if not known and not (entry and int(entry[1]) <= state.seq):
        raise NotFound(f"lineage {path.name} has no {identifier}", f"opt-ops run show {path.name} lists what it has")
