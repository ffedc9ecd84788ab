"""`opt-ops run start|shadow`: the next lineage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli import run
from opt_ops.cli.options import FormatOption, QuietOption, settings
from opt_ops.cli.output import Format, say
from opt_ops.cli.requests import AuthorOption, DryRunOption, WaitOption, ask_daemon, author, show_answer
from opt_ops.errors import UsageError
from opt_ops.runfolder import lineages


def corpus(option: str, given: str) -> str:
    """As it was given, with the whole path: trainers are started elsewhere."""
    if Path(given).exists():
        return str(Path(given).absolute())
    found = re.fullmatch(r"([\w.-]+=)?(.+?)(:[\d.]+)?", given)
    if not found or not Path(found[2]).exists():
        raise UsageError(
            f"{option} {given}: {found[2] if found else given} does not exist", "name a JSONL file, or a folder of them"
        )
    return f"{found[1] or ''}{Path(found[2]).absolute()}{found[3] or ''}"


@run.app.command()
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
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH[:EVERY]",
            help="The same, to evaluate on, every so many updates. [default: the recipe's evaluate_every]",
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
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Start a lineage: the daemon holds nodes for it, trains it to its last step, and recovers it on the way.

    Examples:
      opt-ops run start opt-tiny --set steps=400 --wait
      opt-ops run start opt-125m --data corpus/ --nodes 4 --spares 1 --ranks 8
      opt-ops run start opt-125m --data wiki=wiki/:0.3 --data books=books/:0.7 --valid wiki-valid.jsonl:500
    """
    for setting in set_ or []:
        if not re.fullmatch(r"[\w.]+=.*", setting):
            raise UsageError(f"--set {setting}: not of the form key=value", "python -m trainer --list-recipes")
    if tokenizer and not tokenizer.exists():
        raise UsageError(
            f"--tokenizer {tokenizer} does not exist", "name tokenizer.json, or a folder with GPT-2's files"
        )
    arguments = {
        "recipe": recipe,
        "settings": set_ or [],
        "data": [corpus("--data", each) for each in data or []],
        "valid": [_validation(each) for each in valid or []],
        "tokenizer": str(tokenizer.absolute()) if tokenizer else None,
        "shape": _shape(nodes, spares, ranks, min_nodes),
    }
    if dry_run:
        for line in _foreseen(arguments):
            print(line)
        return
    _begin(lineages.create(settings.config.runs), arguments, wait, output, quiet, by, look="run show")


def _validation(given: str) -> str:
    whole = corpus("--valid", given)
    if (
        not Path(whole).exists()
        and (found := re.search(r":([\d.]+)$", whole))
        and not re.fullmatch("[1-9]\\d*", found[1])
    ):
        raise UsageError(f"--valid {given}: {found[1]} is no whole number of updates", "for example valid.jsonl:500")
    return whole


def _shape(nodes: int | None, spares: int | None, ranks: int | None, min_nodes: int) -> dict[str, int]:
    default = settings.config.shape
    wanted = nodes or default.nodes
    if min_nodes > wanted:
        raise UsageError(f"--min-nodes {min_nodes} is more than --nodes {wanted}", "give fewer, or leave it out")
    return {
        "nodes": wanted,
        "spares": default.spares if spares is None else spares,
        "ranks_per_node": ranks or default.ranks_per_node,
        "min_nodes": min_nodes,
    }


def _foreseen(arguments: Mapping[str, Any]) -> Sequence[str]:
    shape, scheduler = arguments["shape"], settings.config.scheduler
    held = shape["nodes"] + shape["spares"]
    return [
        f"would start   {arguments['recipe']} {' '.join(arguments['settings'])}".rstrip(),
        f"would hold    {held} nodes ({scheduler}), {shape['spares']} of them spare",
        f"would train   {shape['nodes'] * shape['ranks_per_node']} ranks",
    ]


@run.app.command()
def shadow(
    folder: Annotated[Path, typer.Argument(help="Where the training writes telemetry.jsonl and config.json.")],
    checkpoints: Annotated[Path | None, typer.Option(help="Where it saves its step-… folders.")] = None,
    name: Annotated[str, typer.Option(help="What the logbook calls it.")] = "shadow",
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
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
            raise UsageError(f"{path} is not a folder", "name the folder that the training writes to")
    if dry_run:
        print(f"would watch   {folder.absolute()}\nwould touch   nothing")
        return
    lineage = lineages.create(settings.config.runs)
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
    _begin(lineage, arguments, wait, output, quiet, by, look="run explain")


def _begin(
    folder: Path,
    arguments: Mapping[str, Any],
    wait: bool | None,
    output: Format,
    quiet: bool,
    by: str,
    *,
    look: str,
) -> None:
    """Ask for the lineage; its number is what people and shells get."""
    whole = {"lineage": folder.name, **arguments}
    if output in (Format.TABLE, Format.WIDE, Format.NAME):
        print(folder.name, flush=True)  # before it is waited for: an interrupted wait must not lose the number
    answer = ask_daemon(folder, author(by), "start", whole, quiet=quiet, wait=wait)
    if output in (Format.JSON, Format.JSONL):
        show_answer(answer, output)
    say(f"  next: opt-ops {look} {folder.name}", quiet)
