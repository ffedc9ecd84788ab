"""What config.json says beside the settings: planned changes, the digest of the data, the kind of the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.values import LINEAR, PlannedChange, Schedule
from opt_ops.ports import TrainerConfig
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.trainer_files import FileTrainer

SCHEDULE = {"peak_lr": 1e-3, "total_steps": 100}


def read(folder: Path, **fields: Any) -> TrainerConfig:
    path = folder / "12.00" / "a0" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"steps": 100, "schedule": SCHEDULE, "optimizer": {}, **fields}))
    config = FileTrainer(folder).config("12.00-a0")
    assert config is not None
    return config


def test_a_trainer_may_say_nothing_of_it(tmp_path: Path):
    config = read(tmp_path)
    assert (config.planned, config.data, config.schedule.kind) == ((), None, LINEAR)


def test_what_it_says_is_taken(tmp_path: Path):
    config = read(
        tmp_path,
        planned=[{"step": 60, "what": "stage b"}, {"step": 80}],
        data={"digest": "sha256:a", "tokens": 5},
        schedule={**SCHEDULE, "kind": "cosine"},
    )
    assert config.planned == (PlannedChange(step=60, what="stage b"), PlannedChange(step=80))
    assert (config.data, config.schedule.kind) == ("sha256:a", "cosine")


@pytest.mark.parametrize("data", ["c4", [1], {"digest": 5}, None])
def test_what_is_not_as_promised_is_left_out_alone(tmp_path: Path, data: Any):
    config = read(tmp_path, planned=[{"step": 0}, {"what": "b"}, "x", {"step": 7, "what": 3}], data=data)
    assert config.planned == (PlannedChange(step=7),)
    assert config.data is None


def test_what_was_removed_because_of_test_texts_is_known_by_file_also_where_it_was_nothing(tmp_path: Path):
    dedup: dict[str, Any] = {
        "source": "clean",
        "digest": "sha256:1",
        "threshold": 0.95,
        "documents_in": 10,
        "documents_out": 5,
        "removed": {"exact": 0, "near": 0, "contaminated": 3, "corrupt": 0},
        "against": [{"path": "/data/tests/piqa.jsonl", "sha256": "0"}, {"path": "boolq.jsonl"}, {"sha256": "1"}, 7],
        "contaminated": {"/data/tests/piqa.jsonl": 3, "/other/place/tests/rte.jsonl": "many"},
    }
    older = {key: value for key, value in dedup.items() if key not in ("against", "contaminated")}
    first, second = read(tmp_path, data={"digest": "sha256:a", "dedup": [dedup, older]}).dedup
    assert first.against == {"tests/piqa.jsonl": 3, "boolq.jsonl": 0}
    assert second.against == {}


FALL = {"peak_lr": 1e-3, "total_steps": 100}
STATED = {
    "linear": (FALL, Schedule(peak_lr=1e-3, total_steps=100)),
    "cosine": (
        FALL | {"warmup_steps": 7, "delay": 1, "cycles": 1.5, "warmup_from": 0.1, "final_fraction": None},
        Schedule(kind="cosine", peak_lr=1e-3, total_steps=100, warmup_steps=7, delay=1, cycles=1.5, warmup_from=0.1),
    ),
    "polynomial": (FALL | {"power": 2}, Schedule(kind="polynomial", peak_lr=1e-3, total_steps=100, power=2.0)),
    "constant": ({"peak_lr": 1e-3}, Schedule(kind="constant", peak_lr=1e-3)),
    "wsd": (
        FALL | {"decay_steps": 20, "decay": "sqrt", "final_fraction": 0.05},
        Schedule(kind="wsd", peak_lr=1e-3, total_steps=100, decay_steps=20, decay="sqrt", final_fraction=0.05),
    ),
    "table": ({"knots": [[0, 1e-3], [9.5, 0]]}, Schedule(kind="table", knots=((0.0, 1e-3), (9.5, 0.0)))),
    "greedy": ({}, Schedule(kind="greedy")),
    "plateau": ({"peak_lr": "high", "total_steps": 100}, Schedule(kind="plateau", total_steps=100)),
}


@pytest.mark.parametrize("kind", STATED)
def test_each_kind_has_its_own_fields(tmp_path: Path, kind: str):
    fields, schedule = STATED[kind]
    assert read(tmp_path, schedule={"kind": kind, **fields}).schedule == schedule


REFUSED = [
    (
        {"kind": "cosine", "peak_lr": 1e-3},
        "`schedule.total_steps` is missing: a schedule of the kind 'cosine' needs it",
    ),
    ({"total_steps": 9}, "`schedule.peak_lr` is missing: a schedule of the kind 'linear' needs it"),
    ({"kind": "constant", "peak_lr": -1.0}, "`schedule.peak_lr` is -1"),
    ({"kind": "constant", "peak_lr": True}, "`schedule.peak_lr` is true or false, not a number"),
    ({"kind": "wsd", **FALL}, "`schedule.decay_steps` is missing: a schedule of the kind 'wsd' needs it"),
    ({"kind": "wsd", **FALL, "decay_steps": 5, "decay": "exp"}, "`schedule.decay` is 'exp', not linear, cosine, sqrt"),
    ({"kind": "polynomial", **FALL, "power": -1}, "`schedule.power` is -1"),
    ({"kind": "cosine", **FALL, "cycles": "1"}, "`schedule.cycles` is text, not a number"),
    ({"kind": "cosine", **FALL, "delay": 0.5}, "`schedule.delay` is 0.5, not a whole number"),
    ({"kind": "table"}, "`schedule.knots` is missing: a schedule of the kind 'table' needs it"),
    ({"kind": "table", "knots": []}, "`schedule.knots` has no knot"),
    ({"kind": "table", "knots": [[3, 1e-3], [3, 1e-4]]}, "`schedule.knots` does not ascend"),
    ({"kind": "table", "knots": [[3]]}, "`schedule.knots` has a knot of 1 values"),
    ({"kind": "table", "knots": [[3, -1]]}, "`schedule.knots` is -1"),
    ({"kind": "table", "knots": {"3": 1}}, "`schedule.knots` is an object, not a list"),
    ({"kind": 5}, "`schedule.kind` is a number, not text"),
]


@pytest.mark.parametrize(("schedule", "why"), REFUSED)
def test_a_schedule_that_cannot_be_computed_is_refused_with_the_reason(tmp_path: Path, schedule: Any, why: str):
    path = tmp_path / "12.00" / "a0" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"steps": 100, "schedule": schedule, "optimizer": {}}))
    counted = LeftOutCounter(tmp_path)
    assert FileTrainer(tmp_path, counted).config("12.00-a0") is None
    (told,) = counted.left_out()
    assert why in told.newest
    assert "these settings are not taken" in told.newest
