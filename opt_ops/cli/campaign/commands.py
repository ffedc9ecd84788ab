"""`opt-ops campaign`: several sizes on the same data and settings, a forecast before each, one logbook for all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.campaign.start import nodes_by_size, require_all_possible, sizes, tokens_of
from opt_ops.cli.run.start_checks import corpus, require_tokenizer, validation
from opt_ops.cli.shared.foreseen import NOTHING, show_foreseen, thing
from opt_ops.cli.shared.options import (
    ReasonOption,
    RequestOptions,
    require_settings,
    settings,
    watch_now,
    with_request_options,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.requests import author, confirm, is_taken
from opt_ops.core.told.phrase import count
from opt_ops.errors import OptOpsError, Refused, UsageError
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.liveness import Watcher

app = typer.Typer(no_args_is_help=True, help="Train several sizes on the same data, and forecast each.")


def _names(incomplete: str) -> list[str]:
    try:
        known = campaigns.folders(settings.config.runs)
    except OptOpsError:
        return []
    return [path.name for path in known if path.name.startswith(incomplete)]


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The campaign.", autocompletion=_names)]


@app.command()
@with_request_options("yes")
def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of your choice.")],
    options: RequestOptions,
    recipes: Annotated[str, typer.Option("--recipes", metavar="NAME,…", help="The sizes: recipes of the trainer.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH[:WEIGHT]", help="JSONL file or folder, as in `run start`; of all sizes."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="Tokens that each size sees, such as 180B. [default: of each recipe]")
    ] = "",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of each size. [default: configuration]")] = None,
    nodes_file: Annotated[
        Path | None, typer.Option("--nodes-by-size", metavar="FILE", help="Lines with a recipe and its nodes.")
    ] = None,
    spares: Annotated[int | None, typer.Option(min=0, help="Spare nodes of each. [default: configuration]")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on each node. [default: configuration]")] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, max=100, help="Sizes that train at once, at most.")] = 1,
    valid: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH[:EVERY]", help="Validation data, as in `run start`; of all sizes."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or a folder with GPT-2's files.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of all sizes.")
    ] = None,
) -> None:
    """Start a campaign: each size becomes a lineage.

    The smallest is first. The daemon starts a size when nodes are free. At most `--at-once` sizes train together. A
    lineage that halts halts no other. The sizes must be equal in data, tokenizer and settings, but for what the size
    decides. docs/campaign.md says more.

    Examples:
      opt-ops campaign start sizes --recipes opt-125m,opt-350m,opt-1.3b,opt-2.7b --data corpus/ --tokens 180B
      opt-ops campaign start sizes --recipes opt-125m,opt-350m,opt-1.3b --data corpus/ --nodes-by-size nodes.txt
    """
    campaigns.require_name(name)
    config = settings.config
    names = [each.strip() for each in recipes.split(",") if each.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--recipes {recipes}: no recipe, or one that comes twice", "opt-ops run recipes lists them")
    own_nodes = nodes_by_size(nodes_file) if nodes_file else {}
    if unknown := sorted(own_nodes.keys() - set(names)):
        raise UsageError(f"--nodes-by-size {nodes_file}: {unknown[0]} is no size of this campaign", "correct the file")
    common = {
        "settings": require_settings(set_),
        "data": [corpus("--data", each) for each in data or []],
        "valid": [validation(each) for each in valid or []],
        "tokenizer": require_tokenizer(tokenizer),
    }
    wanted = {each: own_nodes.get(each, nodes) for each in names}
    found, remarks = sizes(names, common, tokens_of(tokens) if tokens else None, wanted, spares, ranks, config)
    for remark in dict.fromkeys((*remarks, *require_all_possible(found, common, config))):
        say(f"  note: {remark}", options.quiet)
    if options.dry_run:
        foreseen = [
            thing("campaign_member", "train", f"{size['recipe']} on {count(size['shape']['nodes'], 'node')}", size)
            for size in found
        ]
        show_foreseen(foreseen, NOTHING, options.output)
        return
    path = campaigns.create(config.runs, name, config.group)
    rest = {key: value for key, value in common.items() if key != "settings"}
    _send(path, "start", {"sizes": found, "at_once": at_once, **rest}, options)
    say(f"  next: opt-ops campaign status {name}", options.quiet)


@app.command()
@with_request_options()
def stop(name: NameArgument, options: RequestOptions, reason: ReasonOption = "") -> None:
    """Start no further size. The lineages that have begun go on.

    Example: opt-ops campaign stop sizes --reason "the corpus has a fault"
    """
    path = campaigns.folder(settings.config.runs, name)
    waiting = campaigns.state(path).waiting
    if not waiting:
        raise Refused(f"campaign {name} has no size left to start", f"opt-ops campaign status {name}")
    left = ", ".join(size.recipe for size in waiting)
    if options.dry_run:
        show_foreseen([thing("campaign_stopped", "start", f"none of {left}", {})], NOTHING, options.output)
        return
    confirm(f"Campaign {name}: start none of {left}?", options.yes)
    _send(path, "stop", {"reason": reason}, options)


def _send(path: Path, verb: str, arguments: dict[str, Any], options: RequestOptions) -> None:
    """Leave a request, wait for its answer as the options say, and print it.

    Raises:
        Refused: the daemon refused it.
        Unavailable: `--wait` was given, and no daemon is running.
    """
    request = lineages.ask(path, author(options), verb, arguments, time.time()).request
    status = _answer(path, request, options)
    if options.output in (Format.JSON, Format.JSONL, Format.NAME):
        row = {"campaign": path.name, "request": request, "verb": verb, "status": status}
        show("opt-ops/campaign-request/1", [row], [Column("CAMPAIGN", "campaign")], options.output)
    elif status == "journaled":
        say(f"Campaign {path.name}: the daemon has taken in the request `{verb}`.", options.quiet)


def _answer(path: Path, request: str, options: RequestOptions) -> str:
    if not is_taken(path, request, options, _nobody):
        return "waiting"
    refused = campaigns.state(path).refused.get(request)
    if refused is not None:
        raise Refused(f"the daemon refused: {refused.why}", f"opt-ops campaign status {path.name}")
    return "journaled"


def _nobody() -> Watcher | None:
    """Why nobody would read a request now; None: a daemon lives."""
    watch = watch_now()
    return None if watch.living else Watcher(watched=False, why=watch.why, next="opt-ops daemon ensure")
