"""What `run start` makes sure of before it asks for anything: the trainer would train it, and such nodes exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from opt_ops.cli import trainer_questions
from opt_ops.cli.extras import require_trainer
from opt_ops.config import Config
from opt_ops.core.state.data import data_of
from opt_ops.core.state.model import State
from opt_ops.core.values import DataSince
from opt_ops.errors import SchedulerUnavailable, UsageError


def require_possible(arguments: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Check the arguments of a request `start`. Nothing is held, written or requested.

    Yields:
        What could not be checked, and why.

    Raises:
        UsageError: the scheduler or the trainer would refuse it.
        Unavailable: the trainer's command starts another package, or its packages are not installed.
    """
    require_trainer(config.trainer)
    shape = arguments["shape"]
    wanted = shape["nodes"] + shape["spares"]
    if config.scheduler == "local":
        _require_local_nodes(shape["nodes"], shape["spares"], config.local.nodes)
    else:
        yield from _ask_slurm(wanted, config)
    try:
        trainer_questions.require_accepted(config.trainer, arguments)
    except trainer_questions.Unanswered as error:
        yield f"recipe, settings and data were not checked: {error}"


def require_change_possible(state: State, settings: Sequence[str], config: Config, data: Sequence[str] = ()) -> None:
    """Ask the trainer whether it would train a lineage with other settings or other data, on as many ranks as now.

    Raises:
        UsageError: the trainer would refuse them; the next run would end at once, and the lineage would be halted.
    """
    if state.lineage is None or not (settings or data):
        return
    started, shape = state.lineage, state.shape
    arguments = {
        "recipe": started.recipe,
        "settings": [*started.settings, *(state.run.settings if state.run else ()), *settings],
        "data": data_of(state, state.run)[0].data if state.run else started.data,
        "data_since": _data_since(state, data),
        "valid": started.valid,
        "tokenizer": started.tokenizer,
        "shape": {"nodes": state.wanted_nodes or shape.nodes, "ranks_per_node": shape.ranks_per_node},
    }
    with suppress(trainer_questions.Unanswered):
        trainer_questions.require_accepted(config.trainer, arguments)


def _data_since(state: State, data: Sequence[str]) -> list[dict[str, Any]]:
    """The changes of the data, with one more behind them."""
    known = data_of(state, state.run)[1:] if state.run else ()
    changes = [*known, *([DataSince(step=known[-1].step + 1 if known else 1, data=tuple(data))] if data else [])]
    return [asdict(each) for each in changes]


def _require_local_nodes(nodes: int, spares: int, names: list[str]) -> None:
    if nodes + spares <= len(names):
        return
    wanted = f"{nodes} and {spares} spare" if spares else str(nodes)
    raise UsageError(
        f"this machine has {len(names)} nodes ({', '.join(names[:8])}{', …' if len(names) > 8 else ''}); "
        f"{wanted} are wanted",
        "give fewer --nodes or --spares, or add names to `nodes` of [local] in opt-ops.toml",
    )


def _ask_slurm(nodes: int, config: Config) -> Iterator[str]:
    from opt_ops.adapters.slurm_site import objections

    site = config.slurm
    try:
        found = list(objections(nodes, site.time_minutes, site.partition, site.account))
    except SchedulerUnavailable as error:
        yield f"nodes and limits of Slurm were not checked: {error}"
        return
    if found:
        raise UsageError("; ".join(each.why for each in found), found[0].hint)
