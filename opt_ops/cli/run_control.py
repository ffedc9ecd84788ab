"""What people decide: `opt-ops run pause|resume|stop|note|rollback|set|take-over|hand-back`, `node exclude|allow`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opt_ops.cli import node, node_check, node_ledger, run, views
from opt_ops.cli.options import (
    FormatOption,
    IdArgument,
    QuietOption,
    complete_node,
    complete_step,
    lineage_folder,
    must_know,
)
from opt_ops.cli.output import Format, say
from opt_ops.cli.requests import (
    Asked,
    AuthorOption,
    DryRunOption,
    WaitOption,
    YesOption,
    ask_daemon,
    author,
    show_answer,
)
from opt_ops.core.values import Driver
from opt_ops.errors import Refused, UsageError
from opt_ops.runfolder import lineages

ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the logbook.")]

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Which node.", autocompletion=complete_node)]

# What people type for the settings that they change most.
_SHORT = {"clip": "optim.clip_norm", "weight_decay": "optim.weight_decay", "betas": "optim.betas"}


@run.app.command()
def pause(
    identifier: IdArgument,
    reason: ReasonOption = "paused by hand",
    keep_nodes: Annotated[bool, typer.Option("--keep-nodes", help="Do not give the nodes back meanwhile.")] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let training rest: one more checkpoint is saved, the processes end, the nodes are given back.

    Example: opt-ops run pause 12 --reason "power work in hall 2"
    """
    arguments = {"reason": reason, "keep_nodes": keep_nodes}
    Asked("pause", arguments, "Pause it after one more checkpoint?", yes, dry_run, output, quiet, by, wait).send(
        identifier
    )


@run.app.command()
def resume(
    identifier: IdArgument,
    reason: ReasonOption = "resumed by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Go on: after a pause, after HALTED, or, while a person drives, with the next attempt.

    What failed before counts against no budget any more: a person has looked.

    Example: opt-ops run resume 12 --reason "the shard is mended"
    """
    question = "Go on from the newest verified checkpoint?"
    Asked("resume", {"reason": reason}, question, yes, dry_run, output, quiet, by, wait).send(identifier)


@run.app.command()
def stop(
    identifier: IdArgument,
    reason: ReasonOption = "stopped by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Stop a lineage for good: its processes end, its nodes are given back, its checkpoints stay.

    Example: opt-ops run stop 12 --reason "wrong tokenizer"
    """
    path = lineage_folder(identifier)
    state = lineages.state(path)
    lost = f"{views.cost(path, state, views.lost_if_stopped(path, state))} since the newest good checkpoint"
    question = f"Stop lineage {path.name} ({state.status}) for good? {lost} are lost."
    asked = Asked("stop", {"reason": reason}, question, yes, dry_run, output, quiet, by, wait)
    asked.send(identifier, remark=f"would lose    {lost}", retype=path.name)


@run.app.command()
def note(
    identifier: IdArgument,
    text: Annotated[str, typer.Argument(help="What you saw or think.")],
    correction: Annotated[
        bool, typer.Option("--correction", help="What the logbook says there is wrong; this is right.")
    ] = False,
    wait: WaitOption = None,
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
    must_know(identifier, path, lineages.state(path))
    asked = {"target": identifier, "text": text, "correction": correction}
    show_answer(ask_daemon(path, author(by), "note", asked, quiet=quiet, wait=wait), output)
    say(f"  next: opt-ops logbook open {path.name}", quiet)


@run.app.command()
def rollback(
    identifier: IdArgument,
    to: Annotated[
        int | None,
        typer.Option(
            "--to",
            min=0,
            help="The newest good checkpoint at or before this step. [default: the newest of all]",
            autocompletion=complete_step,
        ),
    ] = None,
    lr_scale: Annotated[
        float | None, typer.Option("--lr-scale", help="Multiply the learning rate from there on.")
    ] = None,
    skip_batches: Annotated[int, typer.Option("--skip-batches", min=0, help="Leave out as many batches.")] = 0,
    reason: ReasonOption = "rolled back by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Begin the next run from an earlier step, or at least from the newest good checkpoint.

    Example: opt-ops run rollback 12 --to 59000 --lr-scale 0.75 --skip-batches 60
    """
    path = lineage_folder(identifier)
    state = lineages.state(path)
    step = views.newest_good_step(state) if to is None else to
    if step is None:
        raise Refused(f"lineage {path.name} has no verified healthy checkpoint yet", f"opt-ops ckpt list {path.name}")
    arguments = {"to_step": step, "lr_factor": lr_scale, "skip_batches": skip_batches, "reason": reason}
    lost = views.cost(path, state, views.lost_beyond(path, state, step))
    question = f"Roll lineage {path.name} back to step {step}? {lost} are taken back."
    asked = Asked("change", arguments, question, yes, dry_run, output, quiet, by, wait)
    asked.send(identifier, remark=f"would lose    {lost}")


@run.app.command("set")
def set_(
    identifier: IdArgument,
    changes: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE…", help="lr, clip, weight_decay, betas, or a recipe's setting.")
    ],
    reason: ReasonOption = "set by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Begin the next run with other settings, after one more checkpoint.

    `lr` is the learning rate of the next update: a factor on the schedule that holds from there on.

    Example: opt-ops run set 12 lr=6e-5 clip=0.5
    """
    arguments: dict[str, Any] = {"reason": reason, "settings": []}
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise UsageError(f"{change}: not of the form key=value", "for example lr=6e-5, or clip=0.5")
        if key == "lr":
            arguments["lr"] = _number(change, value)
        else:
            arguments["settings"].append(f"{_SHORT.get(key, key)}={value}")
    question = f"Begin the next run with {' '.join(changes)}, after one more checkpoint?"
    Asked("change", arguments, question, yes, dry_run, output, quiet, by, wait).send(identifier)


@run.app.command("take-over")
def take_over(
    identifier: IdArgument,
    reason: ReasonOption = "a person drives",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Drive yourself: the daemon goes on watching and says what it would do, and does only what it is asked to.

    Example: opt-ops run take-over 12 --reason "trying a new NCCL"
    """
    arguments = {"driver": str(Driver.PERSON), "reason": reason}
    question = "Take over? Until you hand back, nothing is recovered by itself."
    Asked("drive", arguments, question, yes, dry_run, output, quiet, by, wait).send(identifier)


@run.app.command("hand-back")
def hand_back(
    identifier: IdArgument,
    reason: ReasonOption = "the daemon drives again",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let the daemon drive again.

    Example: opt-ops run hand-back 12
    """
    arguments = {"driver": str(Driver.DAEMON), "reason": reason}
    Asked("drive", arguments, "Let the daemon drive again?", yes, dry_run, output, quiet, by, wait).send(identifier)


@node.app.command()
def exclude(
    identifier: IdArgument,
    name: NodeArgument,
    reason: ReasonOption = "excluded by hand",
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Start no attempt of a lineage on a node any more, and drain it where that is permitted.

    What runs there goes on; `opt-ops run resume` or the next recovery moves it.

    Example: opt-ops node exclude 12 n031 --reason "fan"
    """
    question = f"Exclude {name}, and drain it?"
    Asked("exclude", {"node": name, "reason": reason}, question, yes, dry_run, output, quiet, by, wait).send(identifier)


@node.app.command()
def allow(
    identifier: IdArgument,
    name: NodeArgument,
    reason: ReasonOption = "allowed by hand",
    retest: Annotated[
        bool, typer.Option("--retest", help="Read it and burn it in first; only a fit one returns.")
    ] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
    by: AuthorOption = "",
) -> None:
    """Let attempts start on a node again; says first why it was taken out, and what else is known against it.

    It is not resumed in Slurm: `scontrol update nodename=… state=resume`.

    Examples:
      opt-ops node allow 12 n031 --reason "GPU 3 was exchanged"
      opt-ops node allow 12 n031 --retest
    """
    path = lineage_folder(identifier)
    for line in node_ledger.why_out(path, name):
        say(line, quiet)
    known = lineages.state(path).nodes.get(name)
    if retest and known is not None and known.excluded_by:
        node_check.retest(identifier, name, known.excluded_at)
    question = f"Let attempts start on {name} again{'' if retest else ', without a test (--retest)'}?"
    Asked("allow", {"node": name, "reason": reason}, question, yes, dry_run, output, quiet, by, wait).send(identifier)


def _number(change: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"{change}: {value!r} is not a number", "for example lr=6e-5") from error
