"""`opt-ops run pause|resume|stop|note|rollback|set|take-over|hand-back`: what an operator asks the daemon to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from opt_ops.cli.run import commands as run
from opt_ops.cli.run.start_checks import corpus, require_change_possible
from opt_ops.cli.shared import views
from opt_ops.cli.shared.options import (
    ChangedIdArgument,
    Lineage,
    PlannedOption,
    ReasonOption,
    RequestOptions,
    complete_step,
    default_lineage,
    find_lineage,
    require_known,
    require_planned,
    settings,
    split_id,
    with_request_options,
)
from opt_ops.cli.shared.output import say
from opt_ops.cli.shared.requests import PendingRequest, send_note, show_answer
from opt_ops.core.state.data import change_of, data_now, later_changes, renamed
from opt_ops.core.state.model import State
from opt_ops.core.values import Driver
from opt_ops.errors import Refused, UsageError

# Short names of the settings that operators change most.
_SHORT = {"clip": "optim.clip_norm", "weight_decay": "optim.weight_decay", "betas": "optim.betas"}


@run.app.command()
@with_request_options()
def pause(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    reason: ReasonOption = "paused by hand",
    keep_nodes: Annotated[bool, typer.Option("--keep-nodes", help="Do not release the nodes.")] = False,
) -> None:
    """Pause training: save, end the ranks, release the nodes.

    Example: opt-ops run pause 12 --reason "power work in hall 2"
    """
    arguments = {"reason": reason, "keep_nodes": keep_nodes}
    request = PendingRequest(find_lineage(identifier), "pause", arguments, options)
    request.send("Pause it after one more checkpoint?")


@run.app.command()
@with_request_options()
def resume(identifier: ChangedIdArgument, options: RequestOptions, reason: ReasonOption = "resumed by hand") -> None:
    """Resume training after a pause or a halt.

    In advisory mode, start the next attempt.

    Earlier failures no longer count against the retry budgets.

    Example: opt-ops run resume 12 --reason "the shard is repaired"
    """
    request = PendingRequest(find_lineage(identifier), "resume", {"reason": reason}, options)
    request.send("Resume from the newest verified checkpoint?")


@run.app.command()
@with_request_options()
def stop(identifier: ChangedIdArgument, options: RequestOptions, reason: ReasonOption = "stopped by hand") -> None:
    """Stop a lineage for good: end its ranks, release its nodes.

    Its checkpoints stay.

    Example: opt-ops run stop 12 --reason "wrong tokenizer"
    """
    lineage = find_lineage(identifier)
    path, state = lineage.path, lineage.state
    loss = views.loss(path, state, views.lost_steps(path, state), " since the newest good checkpoint")
    PendingRequest(lineage, "stop", {"reason": reason}, options).send(
        f"Stop lineage {lineage.name} ({state.status}) for good? It discards {loss.text}.",
        loss=loss,
        retype=lineage.name,
    )


@run.app.command()
@with_request_options("yes", "dry_run")
def note(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What you saw or think. Without ID, the only argument.")
    ] = None,
    correction: Annotated[
        bool, typer.Option("--correction", help="The logbook is wrong there; the note is right.")
    ] = False,
) -> None:
    """Write a note into the logbook, under your name.

    A note on an incident (12-i003) or on another entry (12-e57, as in its link) appears below it. The entry stays.

    Examples:
      opt-ops run note "data shard 17 was new here"
      opt-ops run note 12-i003 "it was the switch, not the GPU" --correction
    """
    identifier, text = split_id(identifier, text, 'opt-ops note 12 "the switch was exchanged"', quiet=options.quiet)
    if not text.strip():
        raise UsageError("an empty note says nothing", 'for example opt-ops note "the switch was exchanged"')
    lineage = find_lineage(identifier)
    require_known(identifier, lineage)
    arguments = {"target": identifier, "text": text, "correction": correction}
    show_answer(send_note(PendingRequest(lineage, "note", arguments, options)), options.output)
    say(f"  next: opt-ops logbook open {lineage.name}", options.quiet)


@run.app.command()
@with_request_options()
def rollback(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    to: Annotated[
        int | None,
        typer.Option(
            "--to",
            min=0,
            help="Newest good checkpoint at or before this step. [default: the newest of all]",
            autocompletion=complete_step,
        ),
    ] = None,
    lr_scale: Annotated[
        float | None, typer.Option("--lr-scale", help="Multiply the learning rate from there on.")
    ] = None,
    skip_batches: Annotated[int, typer.Option("--skip-batches", min=0, help="Skip this many batches.")] = 0,
    keep_later: Annotated[
        bool,
        typer.Option("--keep-later", help="Keep rate factors, optimizer settings, skips and data of later steps."),
    ] = False,
    reason: ReasonOption = "rolled back by hand",
) -> None:
    """Start the next run from an earlier checkpoint.

    Without --to, it is the newest good one.

    Changes that began after that step are dropped: learning-rate factors, settings of the optimizer, skipped batches,
    other data.
    `--dry-run` says what the learning rate will be, and where it changes.

    Example: opt-ops run rollback 12 --to 59000 --lr-scale 0.75 --skip-batches 60
    """
    lineage = find_lineage(identifier)
    path, state = lineage.path, lineage.state
    step = views.newest_good_step(state) if to is None else to
    if step is None:
        raise Refused(f"lineage {path.name} has no verified healthy checkpoint yet", f"opt-ops ckpt list {path.name}")
    arguments = {
        "to_step": step,
        "lr_factor": lr_scale,
        "skip_batches": skip_batches,
        "keep_later": keep_later,
        "reason": reason,
    }
    loss = views.loss(path, state, views.lost_steps(path, state, step))
    PendingRequest(lineage, "change", arguments, options).send(
        f"Roll lineage {path.name} back to step {step}? It discards {loss.text}.", loss=loss
    )


@run.app.command("set")
@with_request_options()
def set_(
    identifier: ChangedIdArgument,
    options: RequestOptions,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="lr, clip, weight_decay, betas, or a recipe's setting."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH[:WEIGHT]", help="Train on this from there on. As of `run start`: all of it."),
    ] = None,
    planned: PlannedOption = None,
    reason: ReasonOption = "set by hand",
) -> None:
    """Start the next run with other settings, after one more save.

    Or declare a change that somebody else makes.

    `lr` sets the learning rate of the next update. From there on, it is a factor on the schedule.

    `--data` names all data to train on from there on. A corpus of the same name and text goes on where it was. What
    else the old data had is not read any more, but must stay: a restart looks at it.

    With `--planned` alone, nothing is restarted. The loss detectors learn again from that step on. The step may be
    past, if nothing was done about the change yet.

    Examples:
      opt-ops run set 12 lr=6e-5 clip=0.5
      opt-ops run set 12 --data wiki=wiki/:0.9 --data code=code/:0.1 --reason "code from here on"
      opt-ops run set 12 --planned 48000:stage-b --reason "the data team switches the mix"
    """
    if "=" in identifier:  # the ID was left out
        changes, identifier = [identifier, *(changes or [])], default_lineage(quiet=options.quiet, changes=True)
    arguments: dict[str, Any] = {"reason": reason, "settings": [], "planned": require_planned(planned)}
    if not changes and not data:
        _declare(find_lineage(identifier), arguments, options)
        return
    for change in changes or []:
        key, separator, value = change.partition("=")
        if not separator:
            raise UsageError(f"{change}: not of the form key=value", "for example lr=6e-5, or clip=0.5")
        if key == "lr":
            arguments["lr"] = _number(change, value)
        else:
            arguments["settings"].append(f"{_SHORT.get(key, key)}={value}")
    lineage = find_lineage(identifier)
    what = list(changes or [])
    if data:
        arguments["data"] = [corpus("--data", each) for each in data]
        what.append(f"other data ({_data_change(lineage.state, arguments['data'], options)})")
    require_change_possible(lineage.state, arguments["settings"], settings.config, arguments.get("data", ()))
    request = PendingRequest(lineage, "change", arguments, options)
    request.send(f"Start the next run with {' and '.join(what)}, after one more checkpoint?")


def _data_change(state: State, data: Sequence[str], options: RequestOptions) -> str:
    """What changes: `+ code 10 %`. Remarks on corpora that would begin anew under another name are printed.

    Raises:
        Refused: nothing is trained yet, or nothing changes.
    """
    if state.run is None or state.lineage is None:
        raise Refused("nothing is trained yet", "opt-ops run start RECIPE --data PATH")
    before, later = data_now(state, state.run), later_changes(state, state.run)
    if list(before) == list(data) and not later:
        raise Refused("that is the data already", "opt-ops run show")
    for step in later:
        say(f"  note: the data does not change at step {step:,} any more: --data is all from there on", options.quiet)
    for old, new in renamed(before, data):
        say(f"  note: the text of corpus {old} begins anew as {new}; name it {old}= to go on with it", options.quiet)
    return change_of(before, data)


def _declare(lineage: Lineage, arguments: Mapping[str, Any], options: RequestOptions) -> None:
    """Declare planned changes only: the running attempt goes on."""
    if not arguments["planned"]:
        raise UsageError("nothing is to be set", "give KEY=VALUE, for example lr=6e-5, or --planned STEP[:WHAT]")
    request = {"reason": arguments["reason"], "planned": arguments["planned"]}
    PendingRequest(lineage, "plan", request, options).send(
        f"Declare as planned: {', '.join(arguments['planned'])}? Training goes on. There the detectors learn again."
    )


def _number(change: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"{change}: not a finite number above 0", "for example lr=6e-5")
    return number


@run.app.command("take-over")
@with_request_options()
def take_over(
    identifier: ChangedIdArgument, options: RequestOptions, reason: ReasonOption = "an operator acts"
) -> None:
    """Switch to advisory mode: the daemon acts on requests only.

    It still reports what it would do.

    Example: opt-ops run take-over 12 --reason "trying a new NCCL"
    """
    arguments = {"driver": str(Driver.OPERATOR), "reason": reason}
    request = PendingRequest(find_lineage(identifier), "drive", arguments, options)
    request.send("Switch to advisory mode? The daemon recovers nothing until you hand back.")


@run.app.command("hand-back")
@with_request_options()
def hand_back(
    identifier: ChangedIdArgument, options: RequestOptions, reason: ReasonOption = "the daemon acts again"
) -> None:
    """End advisory mode: the daemon acts by itself again.

    Example: opt-ops run hand-back 12
    """
    arguments = {"driver": str(Driver.DAEMON), "reason": reason}
    request = PendingRequest(find_lineage(identifier), "drive", arguments, options)
    request.send("Let the daemon act again?")
