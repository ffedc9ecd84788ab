"""What config.json says beside the settings: planned changes, the digest of the data, the kind of the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.values import LINEAR, PlannedChange
from opt_ops.ports import TrainerConfig
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
