"""A node comes back with fewer GPUs, and the site may not say how many there should be."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from opt_ops.config import Config, Health, Slurm
from opt_ops.core.health import Gpu, Heartbeat, differing, judge, rank
from opt_ops.core.values import Verdict

SITUATIONS = Path(__file__).with_name("data") / "13-gpu-count-unset" / "situations.csv"
with SITUATIONS.open(newline="", encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table))


def beat(node: str, gpus: int, nvml: str = "ok") -> Heartbeat:
    parts = tuple(Gpu(index=i, uuid=f"{node}-{i}") for i in range(gpus))
    return Heartbeat(node=node, host=node, ts=0.0, attempt=None, nvml=nvml, gpus=parts)


def judged(beats: list[Heartbeat], expected: int) -> dict[str, tuple[Verdict, str]]:
    odd = differing(beats, expected)
    worst = {b.node: min([judge(b, expected), *([odd[b.node]] if b.node in odd else [])], key=rank) for b in beats}
    return {node: (each.verdict, each.reason) for node, each in worst.items()}


@pytest.mark.parametrize("row", ROWS)
def test_a_node_with_fewer_gpus(row: dict[str, str]):
    config = Config.model_validate(
        {
            "scheduler": "slurm",
            **{
                name.split(".")[0]: {"gpus_per_node": int(row[name])}
                for name in ("health.gpus_per_node", "slurm.gpus_per_node")
                if row[name] != "unset"
            },
        }
    )
    expected = config.expected_gpus
    counts = [int(each) for each in row["GPUs seen on n1, n2, n3, n4"].split(", ")]
    found = judged([beat(f"n{i}", count) for i, count in enumerate(counts, 1)], expected)
    wanted = row["wanted of n4"]
    if "gpu_missing" in wanted:
        assert found["n4"][1] == "gpu_missing"
        assert found["n4"][0] is Verdict.BAD or "suspect" in wanted
        assert found["n1"] == (Verdict.HEALTHY, "ok")
    else:
        assert set(found.values()) == {(Verdict.HEALTHY, "ok")}


def test_what_the_site_says_outranks_the_peers():
    mixed = [beat("n1", 8), beat("n2", 8), beat("n3", 8), beat("n4", 4)]
    assert judged(mixed, 4)["n4"] == (Verdict.HEALTHY, "ok")
    assert judged(mixed, 0)["n4"] == (Verdict.SUSPECT, "gpu_missing")


def test_a_node_that_cannot_be_read_has_no_fewer_gpus():
    beats = [beat("n1", 8), beat("n2", 8), beat("n3", 8), beat("n4", 0, nvml="crashed")]
    assert judged(beats, 0)["n4"] == (Verdict.UNKNOWN, "nvml_crashed")


def test_it_is_seen_beside_a_difference_that_matters_less():
    beats = [replace(beat(f"n{i}", 8), driver="570.1") for i in range(3)]
    beats.append(replace(beat("n4", 7), driver="535.1"))
    assert judged(beats, 0)["n4"] == (Verdict.SUSPECT, "gpu_missing")


def test_nodes_without_slurm_are_not_asked_for_gpus_of_slurm():
    assert Config(scheduler="local", slurm=Slurm(gpus_per_node=8)).expected_gpus == 0
    assert Config(scheduler="slurm", slurm=Slurm(gpus_per_node=8), health=Health(gpus_per_node=0)).expected_gpus == 0
