"""`opt-ops run start` and `opt-ops run shadow`: the next lineage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.run import commands as run
from opt_ops.cli.run.first_weights import keep, require_checkpoint
from opt_ops.cli.run.start_checks import corpus, require_possible, require_tokenizer, shape, validation
from opt_ops.cli.run.start_checks import data_since as since
from opt_ops.cli.shared.extras import require_trainer
from opt_ops.cli.shared.foreseen import NOTHING, Foreseen, show_foreseen, thing
from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    Lineage,
    PlannedOption,
    RequestOptions,
    require_planned,
    require_settings,
    settings,
    with_request_options,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.requests import PendingRequest, send_request, show_answer
from opt_ops.core.state.data import change_of
from opt_ops.core.state.model import State
from opt_ops.core.told.phrase import count
from opt_ops.core.values import Driver
from opt_ops.errors import UsageError
from opt_ops.runfolder import lineages


@run.app.command()
@with_request_options("yes")
def start(
    recipe: Annotated[str, typer.Argument(help="Recipe of the trainer, such as opt-tiny or opt-125m.")],
    options: RequestOptions,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH[:WEIGHT]",
            help="JSONL file with a `text` field, or a folder of them. Several are mixed by their weights.",
        ),
    ] = None,
    data_since: Annotated[
        list[str] | None,
        typer.Option(
            "--data-since",
            metavar="STEP:[NAME=]PATH[:WEIGHT]",
            help="What is trained on after STEP, in place of --data. One for each corpus.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH[:EVERY]",
            help="The same for the validation loss, each EVERY updates. [default: the recipe's evaluate_every]",
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or a folder with GPT-2's files.")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Begin with the weights of this checkpoint. [default: random weights]"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train. [default: configuration]")] = None,
    spares: Annotated[int | None, typer.Option(min=0, help="Spare nodes. [default: configuration]")] = None,
    min_nodes: Annotated[
        int, typer.Option(min=0, help="Train on as few nodes as this rather than wait. [default: always --nodes]")
    ] = 0,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on each node. [default: configuration]")] = None,
    planned: PlannedOption = None,
    driver: Annotated[
        Driver,
        typer.Option("--driver", help="daemon acts by itself; ask waits for your approval; person only advises."),
    ] = Driver.DAEMON,
) -> None:
    """Start a lineage. The daemon holds nodes for it, trains it to its last step, and recovers from failures.

    First the trainer is asked whether it would train this, and the scheduler whether it has such nodes. If not, nothing
    is requested, and the exit code is 2. A dry run asks too.

    Examples:
      opt-ops run start opt-tiny --set steps=400 --wait
      opt-ops run start opt-125m --data corpus/ --nodes 4 --spares 1 --ranks 8
      opt-ops run start opt-125m --data wiki=wiki/:0.3 --data books=books/:0.7 --valid wiki-valid.jsonl:500
      opt-ops run start opt-125m --data web/ --data-since 90000:data=web/:0.3 --data-since 90000:books=books/:0.7
      opt-ops run start opt-125m --data corpus/ --init-from converted/opt-125m
    """
    own = require_settings(set_)
    arguments = {
        "recipe": recipe,
        "settings": own,
        "data": [corpus("--data", each) for each in data or []],
        "data_since": since(data_since or []),
        "valid": [validation(each) for each in valid or []],
        "tokenizer": require_tokenizer(tokenizer),
        "init_from": require_checkpoint(init_from),
        "shape": shape(settings.config.shape, nodes, spares, ranks, min_nodes),
        "planned": require_planned(planned),
        "driver": str(driver),
    }
    if driver is Driver.SHADOW:
        raise UsageError("--driver shadow: another launcher runs that training", "opt-ops run shadow FOLDER")
    for remark in require_possible(arguments, settings.config):
        say(f"  note: {remark}", options.quiet)
    if options.dry_run:
        show_foreseen(list(_preview(arguments)), NOTHING, options.output)
        return
    if init_from and (remark := keep(init_from.absolute())):
        say(f"  note: {remark}", options.quiet)
    start_lineage(lineages.create(settings.config.runs, settings.config.group), arguments, options, look="watch")


@run.app.command()
def recipes(output: FormatOption = Format.TABLE, header: HeaderOption = True) -> None:
    """List the recipes of the trainer, for `opt-ops run start`.

    Example: opt-ops run recipes
    """
    from opt_ops.cli.trainer import questions as trainer_questions

    require_trainer(settings.config.trainer)
    rows = trainer_questions.recipes(settings.config.trainer)
    columns = [
        Column("RECIPE", "recipe"),
        Column("SIZE", "size", right=True),
        Column("STEPS", "steps", right=True),
        Column("TOKENS", "trained_on", right=True),
        Column("TP", "tp", wide=True, right=True),
        Column("WHAT", "about"),
    ]
    if output in (Format.TABLE, Format.WIDE):
        rows = [{**row, "size": _short(row.get("parameters")), "trained_on": _short(row.get("tokens"))} for row in rows]
    show("opt-ops/recipe-list/1", rows, columns, output, header=header)


def _short(number: Any) -> str | None:
    """A count as people write it: 125M, 1.3B."""
    if not isinstance(number, int):
        return None
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _preview(arguments: Mapping[str, Any]) -> Iterator[Foreseen]:
    yield thing("lineage_started", "train", what_trains(arguments), dict(arguments))
    before = arguments["data"]
    for each in arguments["data_since"]:
        change = f"the data after step {each['step']:,}: {change_of(before, each['data'])}"
        yield thing("data_since", "change", change, each)
        before = each["data"]
    yield from nodes_and_ranks(arguments["shape"])
    if arguments["init_from"]:
        weights = arguments["init_from"]
        yield thing("weights", "begin", f"with the weights of {weights}", {"init_from": weights})


@run.app.command()
@with_request_options("yes")
def shadow(
    folder: Annotated[Path, typer.Argument(help="Where the training writes telemetry.jsonl and config.json.")],
    options: RequestOptions,
    checkpoints: Annotated[Path | None, typer.Option(help="Where it saves its step-… folders.")] = None,
    name: Annotated[str, typer.Option(help="Name of the training in the logbook.")] = "shadow",
) -> None:
    """Watch training that another launcher started. The daemon journals its decisions and changes nothing.

    `opt-ops run explain` and the logbook show the decisions. docs/formats.md says what the training must write.
    Without checkpoints in our format, a rollback is assumed to start at step 0.

    Example: opt-ops run shadow /shared/job-8842 --checkpoints /shared/job-8842/checkpoints
    """
    for path in [folder, *([checkpoints] if checkpoints else [])]:
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder", "name the folder that the training writes to")
    if options.dry_run:
        show_foreseen([thing("watch", "watch", f"{folder.absolute()}, and change nothing")], NOTHING, options.output)
        return
    lineage = lineages.create(settings.config.runs, settings.config.group)
    run_folder = lineage / f"{lineage.name}.00"
    run_folder.mkdir()
    (run_folder / "a0").symlink_to(folder.absolute())
    if checkpoints:
        (run_folder / "checkpoints").symlink_to(checkpoints.absolute())
    arguments = {
        "recipe": name,
        "settings": [],
        "data": [],
        "tokenizer": None,
        "shape": {"nodes": 1, "spares": 0, "ranks_per_node": 1},
        "driver": "shadow",
    }
    start_lineage(lineage, arguments, options, look="explain")


def what_trains(arguments: Mapping[str, Any]) -> str:
    """`opt-tiny with steps=400 on 2 nodes`."""
    with_ = f" with {', '.join(arguments['settings'])}" if arguments["settings"] else ""
    return f"{arguments['recipe']}{with_} on {count(arguments['shape']['nodes'], 'node')}"


def nodes_and_ranks(shape: Mapping[str, int]) -> Iterator[Foreseen]:
    """What would be asked of the scheduler, and started on its nodes."""
    nodes, spares, ranks = shape["nodes"], shape["spares"], shape["nodes"] * shape["ranks_per_node"]
    held = f"{count(nodes + spares, 'node')} ({settings.config.scheduler}), {spares} of them spare"
    yield thing("allocation_intended", "ask", f"for {held}", {"nodes": nodes + spares, "spares": spares})
    yield thing("attempt_intended", "start", count(ranks, "rank"), {"ranks": ranks})


def start_lineage(folder: Path, arguments: Mapping[str, Any], options: RequestOptions, *, look: str) -> None:
    """Request the lineage. Print its number first: an interrupted wait must not lose it.

    Raises:
        OptOpsError: see `send_request`.
    """
    output = options.output
    if output in (Format.TABLE, Format.WIDE, Format.NAME):
        print(folder.name, flush=True)
    request = PendingRequest(Lineage(folder, State()), "start", {"lineage": folder.name, **arguments}, options)
    try:
        answer = send_request(request)
    except (OSError, ValueError):  # it could not be written; without a request the folder would be a lineage of nothing
        if not any((folder / "inbox").glob("*")) and not any((folder / "journal").glob("*.jsonl")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if output in (Format.JSON, Format.JSONL):
        show_answer(answer, output)
    say(f"  next: opt-ops {look} {folder.name}", options.quiet)
