"""What MLflow shows beside the runs: the data, the milestone checkpoints, and a few numbers of the machines. Pure.

The data themselves and the checkpoints stay where they are; MLflow learns their names, digests and places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from opt_ops.core.health.readings import Heartbeat
from opt_ops.core.state.model import KnownCheckpoint, State
from opt_ops.core.state.queries import ancestry
from opt_ops.core.state.status import Status

MILESTONES = 10  # checkpoints of a lineage that become models: the first good one of every tenth, and the last

_DIGEST, _NAME, _TEXT = 36, 500, 65_000  # characters that MLflow takes of a dataset's digest, name, source and profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a run was trained on, as MLflow's dataset input."""

    name: str
    digest: str
    source: str
    profile: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestone:
    """A checkpoint worth keeping, as MLflow's external model."""

    name: str
    run: str
    step: int
    path: str


def data(config: Mapping[str, Any]) -> Data | None:
    """Of an attempt's config.json; None where the trainer says nothing of its data."""
    told = config.get("data")
    if not isinstance(told, Mapping) or not told.get("digest"):
        return None
    sources = [str(source) for source in told.get("sources") or ["the recipe's own"]]
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return Data(
        name=f"{PurePath(sources[0]).name or sources[0]}{more}"[:_NAME],
        digest=str(told["digest"]).rpartition(":")[2][:_DIGEST],
        source=json.dumps({"sources": sources, "digest": told["digest"], "tokenizer": told.get("tokenizer")})[:_TEXT],
        profile=json.dumps({"tokens": told.get("tokens")})[:_TEXT],
    )


def milestones(state: State, total: int | None) -> list[Milestone]:
    """The good checkpoints on the way to the present weights that are first in a tenth of the work, and the last one.

    The last one counts when the lineage is complete: until then it is only the newest.
    """
    if state.run is None or not total:
        return []
    on_the_way = sorted(_path(state), key=lambda known: known.checkpoint.step)
    chosen: dict[int, KnownCheckpoint] = {}
    for known in on_the_way:
        chosen.setdefault(known.checkpoint.step * MILESTONES // total, known)
    chosen.pop(0, None)  # the first tenth is begun with nothing
    if state.status is Status.COMPLETED and on_the_way:
        chosen[MILESTONES] = on_the_way[-1]
    found = {known.checkpoint.path: known.checkpoint for known in chosen.values()}.values()
    return [
        Milestone(name=f"{p.run.replace('.', '-')}-step-{p.step}", run=p.run, step=p.step, path=p.path) for p in found
    ]


def _path(state: State) -> Iterator[KnownCheckpoint]:
    assert state.run is not None
    limits = dict(ancestry(state, state.run.name))
    for known in state.checkpoints.values():
        limit = limits.get(known.checkpoint.run, 0)
        if known.good and (limit is None or known.checkpoint.step <= limit):
            yield known


def machines(beats: Sequence[Heartbeat]) -> tuple[dict[str, float], str, float] | None:
    """The newest heartbeats' GPUs in a few numbers, the one to look at first, and when; None without readings.

    Never every GPU's series: five thousand columns are what MLflow's pages die of.
    """
    gpus = [(beat.node, gpu) for beat in beats for gpu in beat.gpus]
    found: dict[str, float] = {}
    for key, values in (
        ("temperature_celsius", [gpu.temperature for _, gpu in gpus]),
        ("power_watts", [gpu.power_watts for _, gpu in gpus]),
        ("utilization_percent", [gpu.utilization for _, gpu in gpus]),
    ):
        known = [float(value) for value in values if value is not None]
        if known:
            spread = {"min": min(known), "median": median(known), "max": max(known)}
            found |= {f"system/gpu_{key}_{name}": value for name, value in spread.items()}
    hot = max(
        (each for each in gpus if each[1].temperature is not None), key=lambda e: e[1].temperature or 0, default=None
    )
    if not found or hot is None:
        return None
    node, gpu = hot
    return found, f"{node} GPU {gpu.index} ({gpu.serial or gpu.uuid}): {gpu.temperature} °C", max(b.ts for b in beats)
