"""Data, milestones and machines, as MLflow is shown them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chronicles.mlflow_mirror.assets import dataset, gpu_summary, milestones
from chronicles.record import load
from opt_ops.core.health import Gpu, Heartbeat
from tests.chronicles.told import Told, spiked

BEAT = Heartbeat(node="n1", host="n1", ts=5.0, attempt=None, nvml="ok")


def test_milestones_are_on_the_way_to_the_present_weights(told: Told):
    spiked(told)  # 12.00 saved 100 and 150, and was left at 100
    told.save("12.01", 110)
    told.save("12.01", 121, healthy=False, why="spike")
    told.save("12.01", 130)
    found = milestones(load(told.folder).state, 400)
    assert [(each.name, each.step) for each in found] == [("12-00-step-100", 100), ("12-01-step-130", 130)]
    assert milestones(load(told.folder).state, None) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"data": {"sources": []}}, None),
        ({"data": {"sources": [], "digest": "sha256:" + "a" * 64}}, ("the recipe's own", "a" * 36)),
        ({"data": {"sources": ["/d/pile", "/d/cc"], "digest": "sha256:bc"}}, ("pile and 1 more", "bc")),
    ],
)
def test_data_are_named_and_digested(config: dict[str, Any], expected: tuple[str, str] | None):
    found = dataset(config)
    assert (found and (found.name, found.digest)) == expected


def test_many_gpus_are_a_few_numbers_and_one_name():
    gpus = [Gpu(index=i, serial=f"s{i}", temperature=60 + i, power_watts=600.0, utilization=None) for i in range(8)]
    beats = [replace(BEAT, node=f"n{n}", ts=float(n), gpus=tuple(gpus)) for n in range(100)]
    beats[7] = replace(beats[7], gpus=(replace(gpus[0], temperature=93, serial="bad"), *gpus[1:]))
    found = gpu_summary(beats)
    assert found is not None
    assert len(found.values) == 6
    assert found.values["system/gpu_temperature_celsius_max"] == 93.0
    assert found.values["system/gpu_power_watts_median"] == 600.0
    assert (found.hottest, found.ts) == ("n7 GPU 0 (bad): 93 °C", 99.0)
    assert gpu_summary([BEAT]) is None
    assert gpu_summary([]) is None
