"""`opt-ops run fork`: a new lineage that goes on from a checkpoint of another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.run import commands as run
from opt_ops.cli.run.start import nodes_and_ranks, start_lineage, what_trains
from opt_ops.cli.run.start_checks import corpus, require_possible
from opt_ops.cli.shared.foreseen import NOTHING, Foreseen, show_foreseen, thing
from opt_ops.cli.shared.options import (
    Lineage,
    ReasonOption,
    RequestOptions,
    complete_step,
    find_lineage,
    require_known,
    require_settings,
    settings,
    with_request_options,
)
from opt_ops.cli.shared.output import say
from opt_ops.core.decide.next_run import RunSettings, begun_by, factor_to
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.names import lineage_of, pin_holder
from opt_ops.core.schedule import PlannedLr, is_computed
from opt_ops.core.state.data import data_of
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import planned_changes
from opt_ops.core.state.queries import reachable_checkpoints, total_steps
from opt_ops.core.values import Checkpoint, Driver, LrFactor, Parent
from opt_ops.errors import Refused, UsageError
from opt_ops.runfolder import lineages


@run.app.command()
@with_request_options("yes")
def fork(
    identifier: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Run 12.01, or lineage 12: its newest run. It may have ended."),
    ],
    options: RequestOptions,
    at: Annotated[
        int | None,
        typer.Option(
            "--at",
            min=1,
            metavar="STEP",
            help="Newest good checkpoint at or before this step. [default: the newest of all]",
            autocompletion=complete_step,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting on top of the parent's.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of the first update, by a factor.")] = None,
    lr_scale: Annotated[
        float | None, typer.Option("--lr-scale", help="Multiply the learning rate from the first update on.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH[:WEIGHT]", help="As of `run start`. [default: the parent's data]"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train. [default: the parent's]")] = None,
    spares: Annotated[int | None, typer.Option(min=0, help="Spare nodes. [default: the parent's]")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on each node. [default: the parent's]")] = None,
    reason: ReasonOption = "",
) -> None:
    """Start a new lineage from a checkpoint of another one.

    Weights, optimizer state, step and data position come from the checkpoint. The settings are those in force there,
    with yours on top. Every byte of the checkpoint is read before anything is requested; a damaged one is passed over
    for an older one. The checkpoint is kept until the new lineage has a good one of its own. The model's size and its
    tokenizer cannot be changed. Exit code 4: there is no good checkpoint at or before STEP.

    Examples:
      opt-ops run fork 12 --at 60000 --lr-scale 0.5 --reason "rate too high?"
      opt-ops run fork 12.01 --set optim.clip_norm=0.3 --dry-run
    """
    lineage = find_lineage(identifier)
    name = _run_of(identifier, lineage)
    if lr is not None and lr_scale is not None:
        raise UsageError("--lr and --lr-scale exclude each other", "give one of them")
    for option, value in (("--lr", lr), ("--lr-scale", lr_scale)):
        if value is not None and not 0 < value <= 1e12:
            raise UsageError(f"{option} {value:g}: must be above 0", f"for example {option} 0.5")
    own = require_settings(set_)
    origin = _origin(lineage, name, at, options.quiet)
    arguments = _arguments(lineage.state, name, origin, own, (lr, lr_scale), data or [])
    arguments |= {"shape": _shape(lineage.state, nodes, spares, ranks), "reason": reason}
    _require_steps_left(lineage, name, origin, arguments["settings"], own)
    for remark in require_possible(arguments, settings.config):
        say(f"  note: {remark}", options.quiet)
    if options.dry_run:
        show_foreseen(list(_preview(arguments)), NOTHING, options.output)
        return
    _start(origin, arguments, options)


def _run_of(identifier: str, lineage: Lineage) -> str:
    """The run that an identifier names.

    Raises:
        UsageError: it names an attempt, an incident or an entry.
        NotFound: there is no such run.
        Refused: the lineage cannot be forked: it has made no run, or another launcher runs it.
    """
    require_known(identifier, lineage)
    state = lineage.state
    if identifier not in (lineage.name, *state.runs):
        raise UsageError(f"{identifier} is neither a lineage nor a run", f"for example opt-ops run fork {lineage.name}")
    if state.run is None:
        raise Refused(f"lineage {lineage.name} has no checkpoint yet", f"opt-ops run show {lineage.name}")
    if state.driver is Driver.SHADOW:
        why = f"lineage {lineage.name} is only watched: another launcher runs that training"
        raise Refused(why, "opt-ops run start … --init-from CHECKPOINT begins with the weights of a checkpoint")
    return state.run.name if identifier == lineage.name else identifier


# ---- the checkpoint


def _origin(lineage: Lineage, run_name: str, at: int | None, quiet: bool) -> Checkpoint:
    """The newest checkpoint at or before `at` whose every byte is as its manifest says.

    Raises:
        Refused: there is none; the message names the steps that there are.
    """
    from opt_ops.runfolder.checkpoints import problem

    good = _good(lineage.state, run_name)
    damaged: dict[int, str] = {}
    for checkpoint in good:
        if at is not None and checkpoint.step > at:
            continue
        say(f"reading the checkpoint of step {checkpoint.step:,} …", quiet)
        why = problem(checkpoint)
        if not why:
            for step, found in damaged.items():
                say(f"  note: the checkpoint of step {step:,} is passed over: {found}", quiet)
            return checkpoint
        damaged[checkpoint.step] = why
    left = [each.step for each in good if each.step not in damaged]
    steps = ", ".join(f"{step:,}" for step in sorted(left)) or "none"
    until = f" at or before step {at:,}" if at is not None else ""
    found = "".join(f"; that of step {step:,} is damaged: {why}" for step, why in damaged.items())
    hint = f"opt-ops run fork {run_name} --at {min(left)}" if left else f"opt-ops ckpt list {lineage.name} says why"
    raise Refused(f"{run_name} has no verified healthy checkpoint{until}{found}. Steps of the good ones: {steps}", hint)


def _good(state: State, run_name: str) -> list[Checkpoint]:
    """The durable good checkpoints on the way to a run's weights, the newest first. A snapshot is on nodes' disks."""
    known = (each for each in reachable_checkpoints(state, run_name) if each.good and not each.checkpoint.nodes)
    there = (each.checkpoint for each in known if Path(each.checkpoint.path).is_dir())
    return sorted(there, key=lambda checkpoint: checkpoint.step, reverse=True)


def _require_steps_left(
    lineage: Lineage, run_name: str, origin: Checkpoint, asked: Sequence[str], own: Sequence[str]
) -> None:
    """Check that there is something to train.

    Raises:
        Refused: the checkpoint is that of the last step, or a later one.
    """
    given = [value for name, _, value in (each.partition("=") for each in asked) if name == "steps"]
    last = int(given[-1]) if given and given[-1].isdecimal() else total_steps(lineage.state)
    if last is None or origin.step < last:
        return
    earlier = [each.step for each in _good(lineage.state, run_name) if each.step < min(last, origin.step)]
    steps = ", ".join(f"{step:,}" for step in sorted(earlier)) or "none"
    words = "".join(f" --set {each}" for each in own if not each.startswith("steps="))
    raise Refused(
        f"nothing is left to train from step {origin.step:,}: steps={last}. Steps of earlier good checkpoints: {steps}",
        f"opt-ops run fork {run_name}{words} --set steps={2 * origin.step}, or --at an earlier step",
    )


# ---- what the new lineage is asked to be


def _arguments(
    state: State,
    run_name: str,
    origin: Checkpoint,
    own: Sequence[str],
    rate: tuple[float | None, float | None],
    data: Sequence[str],
) -> dict[str, Any]:
    """The arguments of the request `start`, without the shape."""
    asked = state.intent
    kept = begun_by(state, state.runs[run_name], origin.step)
    trained_on = data_of(state, state.runs[run_name])
    factor = _lr_factor(state, kept, own, rate, origin.step)
    factors = [*kept.lr_factors, *([LrFactor(step=origin.step, factor=factor)] if factor is not None else [])]
    parent = Parent(lineage=lineage_of(origin.run), run=origin.run, step=origin.step, checkpoint=origin.path)
    return {
        "recipe": asked.recipe,
        "settings": [*asked.settings, *kept.settings, *own],
        "data": [corpus("--data", each) for each in data] or list(trained_on[0].data),
        "data_since": [] if data else [dataclasses.asdict(each) for each in kept.data if each.step],
        "valid": list(asked.valid),
        "tokenizer": asked.tokenizer or (_trained_tokenizer(origin) if data else None),
        "init_from": asked.init_from,
        "planned": [
            f"{each.step}:{each.what}" for each in planned_changes(state) if each.step > origin.step and each.what
        ],
        "parent": dataclasses.asdict(parent),
        "lr_factors": [dataclasses.asdict(each) for each in factors],
        "skips": [dataclasses.asdict(each) for each in kept.skips],
    }


def _lr_factor(
    state: State, kept: RunSettings, own: Sequence[str], rate: tuple[float | None, float | None], step: int
) -> float | None:
    """The fork's own factor on the schedule.

    Raises:
        Refused: no factor makes the learning rate that is asked for.
    """
    lr, scale = rate
    if lr is None:
        return scale
    known = baseline(state)
    if known is None:
        raise Refused("the learning rate cannot be set: no attempt has reported its schedule", "use --lr-scale")
    schedule, _ = with_settings(*known, (*kept.settings, *own))
    if not is_computed(schedule):
        raise Refused(f"the trainer's schedule is {schedule.kind!r}; opt-ops can only scale it", "use --lr-scale")
    factor = factor_to(lr, PlannedLr(schedule=schedule, factors=kept.lr_factors), step)
    if factor is None:
        why = f"the schedule's learning rate after step {step} is 0, and a factor cannot raise it"
        raise Refused(why, "change the schedule, for example with --set optim.total_steps=…")
    return factor


def _trained_tokenizer(origin: Checkpoint) -> str:
    """The tokenizer that the parent trained on its own data: other data must not train another one.

    Raises:
        Refused: the parent's attempts have left none.
    """
    run_folder = Path(origin.path).parents[1]
    if not (found := sorted(run_folder.glob("a*/tokenizer.json"))):
        raise Refused(
            f"tokenizer: other --data would train another tokenizer, and {run_folder} has none of {origin.run}",
            "leave --data out, or start the parent with --tokenizer",
        )
    return str(found[-1])


def _shape(state: State, nodes: int | None, spares: int | None, ranks: int | None) -> dict[str, int]:
    default = state.shape
    wanted = nodes or default.nodes
    return {
        "nodes": wanted,
        "spares": default.spares if spares is None else spares,
        "ranks_per_node": ranks or default.ranks_per_node,
        "min_nodes": min(default.min_nodes, wanted),
    }


def _preview(arguments: Mapping[str, Any]) -> Iterator[Foreseen]:
    parent = arguments["parent"]
    what = f"{what_trains(arguments)}, from step {parent['step'] + 1:,}"
    origin = f"{parent['run']} at step {parent['step']:,}: {parent['checkpoint']}"
    yield thing("lineage_started", "fork", origin, dict(arguments))
    yield thing("run_planned", "train", what, {"first_step": parent["step"] + 1})
    for each in arguments["lr_factors"]:
        rest = f"the learning rate by {each['factor']:g} after step {each['step']:,}"
        yield thing("lr_factor", "scale", rest, each)
    yield from nodes_and_ranks(arguments["shape"])


def _start(origin: Checkpoint, arguments: Mapping[str, Any], options: RequestOptions) -> None:
    """Pin the checkpoint and request the lineage. The daemon goes on to hold the pin."""
    from opt_ops.contract.manifest import pin, unpin

    folder = lineages.create(settings.config.runs, settings.config.group)
    holder, path = pin_holder(folder.name), Path(origin.path)
    try:
        pin(path, holder)
    except OSError as error:
        say(f"  note: {path} may be thinned out before the new lineage has begun: {error.strerror}", options.quiet)
    try:
        start_lineage(folder, arguments, options, look="watch")
    except (Refused, OSError, ValueError):
        if not any((folder / "inbox").glob("*")):
            unpin(path, holder)
        raise
