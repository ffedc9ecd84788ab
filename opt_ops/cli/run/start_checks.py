"""What starting a lineage makes sure of before it asks for anything: options, the trainer agrees, such nodes exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_ops.cli.shared.extras import require_trainer
from opt_ops.cli.trainer import questions as trainer_questions
from opt_ops.config import Config, DefaultShape
from opt_ops.contract.data_since import by_step, parse_data_since
from opt_ops.core.state.data import data_of, later_changes
from opt_ops.core.state.model import State
from opt_ops.core.values import DataSince
from opt_ops.errors import SchedulerUnavailable, UsageError


def corpus(option: str, given: str) -> str:
    """The value of `--data` or `--valid` with an absolute path: the daemon starts trainers in another folder.

    Raises:
        UsageError: the path does not exist.
    """
    if Path(given).exists():
        return str(Path(given).absolute())
    found = re.fullmatch(r"([\w.-]+=)?(.+?)(:[\d.]+)?", given)
    path, colon, behind = found[2].rpartition(":") if found else ("", "", "")
    if found and colon and not Path(found[2]).exists() and Path(path).exists():
        raise UsageError(f"{option} {given}: {behind!r} behind the colon is no number", "for example wiki=wiki/:0.3")
    if not found or not Path(found[2]).exists():
        raise UsageError(
            f"{option} {given}: {found[2] if found else given} does not exist", "name a JSONL file, or a folder of them"
        )
    return f"{found[1] or ''}{Path(found[2]).absolute()}{found[3] or ''}"


def data_since(given: Sequence[str]) -> list[dict[str, Any]]:
    """The values of `--data-since` by step, with absolute paths.

    Raises:
        UsageError: one has another form, or a path does not exist.
    """
    found: list[tuple[int, str]] = []
    for each in given:
        try:
            step, text = parse_data_since(each)
        except ValueError as error:
            raise UsageError(f"--data-since {each}: {error}", "for example 61000:wiki=wiki/:0.25") from error
        found.append((step, corpus(f"--data-since {step}:", text)))
    return [{"step": step, "data": data} for step, data in by_step(found).items()]


def validation(given: str) -> str:
    """The value of `--valid` with an absolute path.

    Raises:
        UsageError: the path does not exist, or the interval is no number.
    """
    whole = corpus("--valid", given)
    if (
        not Path(whole).exists()
        and (found := re.search(r":([\d.]+)$", whole))
        and not re.fullmatch("[1-9]\\d*", found[1])
    ):
        raise UsageError(f"--valid {given}: {found[1]} is no whole number of updates", "for example valid.jsonl:500")
    return whole


def shape(
    default: DefaultShape, nodes: int | None, spares: int | None, ranks: int | None, min_nodes: int = 0
) -> dict[str, int]:
    """The shape of a request `start`: as given, or as the site has it.

    Raises:
        UsageError: fewer nodes are wanted than the least.
    """
    wanted = nodes or default.nodes
    if min_nodes > wanted:
        raise UsageError(
            f"--min-nodes {min_nodes} is more than --nodes {wanted}", "give a smaller --min-nodes, or none"
        )
    return {
        "nodes": wanted,
        "spares": default.spares if spares is None else spares,
        "ranks_per_node": ranks or default.ranks_per_node,
        "min_nodes": min_nodes,
    }


def require_tokenizer(given: Path | None) -> str | None:
    """The value of `--tokenizer` with an absolute path.

    Raises:
        UsageError: it does not exist.
    """
    if given and not given.exists():
        raise UsageError(f"--tokenizer {given} does not exist", "name tokenizer.json, or a folder with GPT-2's files")
    return str(given.absolute()) if given else None


def require_possible(arguments: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Check the arguments of a request `start`. Nothing is held, written or requested.

    Yields:
        What the trainer remarks on it. What could not be checked, and why.

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
        yield from trainer_questions.require_accepted(config.trainer, arguments)
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
    """The changes of the data, with one more behind those that have begun."""
    known = data_of(state, state.run)[1:] if state.run else ()
    if data and state.run:
        known = [each for each in known if each.step not in later_changes(state, state.run)]
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
