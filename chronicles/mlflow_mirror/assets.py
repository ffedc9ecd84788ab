"""What MLflow shows beside the runs: datasets, milestone checkpoints, and a few numbers about the GPUs. Pure.

Data and checkpoints stay where they are; MLflow gets their names, digests and places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median

from chronicles.mlflow_mirror.parameters import Json
from opt_ops.core.health.readings import Heartbeat
from opt_ops.core.state.checkpoints import KnownCheckpoint
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import ancestry
from opt_ops.core.state.status import Status

MILESTONES = 10  # checkpoints of a lineage that become models: the first good one of each tenth, and the last

_DIGEST, _NAME, _TEXT = 36, 500, 65_000  # MLflow's limits, in characters: a dataset's digest, name, other texts


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInput:
    """What a run was trained on, as an input of MLflow."""

    name: str
    digest: str
    source: str
    profile: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestone:
    """A checkpoint that MLflow shows as an external model."""

    name: str
    run: str
    step: int
    path: str


def dataset(config: Json) -> DatasetInput | None:
    """The data of an attempt's config.json; None if the trainer does not describe its data."""
    data = config.get("data")
    if not isinstance(data, Mapping) or not data.get("digest"):
        return None
    sources = [str(source) for source in data.get("sources") or ["the recipe's own"]]
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return DatasetInput(
        name=f"{PurePath(sources[0]).name or sources[0]}{more}"[:_NAME],
        digest=str(data["digest"]).rpartition(":")[2][:_DIGEST],
        source=json.dumps({"sources": sources, "digest": data["digest"], "tokenizer": data.get("tokenizer")})[:_TEXT],
        profile=json.dumps({"tokens": data.get("tokens")})[:_TEXT],
    )


def milestones(state: State, total: int | None) -> list[Milestone]:
    """The first good checkpoint of each tenth of the work, of those on the way to the present weights, and the last.

    The last one is a milestone when the lineage is complete; until then it is only the newest.
    """
    if state.run is None or not total:
        return []
    on_the_way = sorted(_path(state), key=lambda known: known.checkpoint.step)
    chosen: dict[int, KnownCheckpoint] = {}
    for known in on_the_way:
        chosen.setdefault(known.checkpoint.step * MILESTONES // total, known)
    chosen.pop(0, None)  # nothing is trained when the first tenth begins
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSummary:
    """The GPUs of an attempt in a few numbers."""

    values: Mapping[str, float]  # by MLflow's name of the metric
    hottest: str  # the GPU to look at first
    ts: float


def gpu_summary(beats: Sequence[Heartbeat]) -> GpuSummary | None:
    """The GPUs of the newest heartbeats; None without readings.

    There is no series for each GPU: MLflow's pages cannot show five thousand columns.
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
    read = [each for each in gpus if each[1].temperature is not None]
    if not found or not read:
        return None
    node, gpu = max(read, key=lambda each: each[1].temperature or 0)
    hottest = f"{node} GPU {gpu.index} ({gpu.serial or gpu.uuid}): {gpu.temperature} °C"
    return GpuSummary(values=found, hottest=hottest, ts=max(beat.ts for beat in beats))
