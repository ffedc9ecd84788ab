"""What a trainer writes into the folder of its attempt, and what the attempt begins with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from opt_ops.contract import CheckpointError, Options, RunFolder, UserError, commit, starting_point, write_rank
from opt_ops.runfolder.telemetry import point_of
from opt_ops.runfolder.trainer_files import FileTrainer

LINE = {"num_updates": 1, "loss": 3.0, "gnorm": 0.5, "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1,
    "clip_norm": 1.0, "step_seconds": 0.1, "tokens": 8, "wps": 80.0, "data_position": 8}  # fmt: skip


def options(tmp_path: Path, **more: object) -> Options:
    return Options(run_dir=tmp_path / "1.00/a1", checkpoint_dir=tmp_path / "1.00/checkpoints", attempt="a1", **more)


def lines(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "1.00/a1" / name).read_text().splitlines()]


def test_the_supervisor_reads_what_it_writes(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), 0)
    schedule = {"peak_lr": 1e-3, "warmup_steps": 1, "total_steps": 9, "final_fraction": 0.1}
    folder.config(steps=9, schedule=schedule, optimizer={"betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0})
    for step in (0, 0, 1):
        folder.phase("training", step)
    folder.telemetry(**LINE)
    trainer = FileTrainer(tmp_path)
    config = trainer.config("1.00-a1")
    assert config is not None
    assert (config.steps, config.schedule.peak_lr, config.optimizer.betas) == (9, 1e-3, (0.9, 0.95))
    assert [phase.name for phase in trainer.phases("1.00-a1")] == ["start", "training"]
    assert [(point.step, point.loss, point.finite) for point in trainer.points("1.00-a1")] == [(1, 3.0, True)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"loss": float("nan")}, (None, 0.5, False)),
        ({"gnorm": float("inf")}, (3.0, None, False)),
        ({"gnorm": None}, (3.0, None, True)),
        ({"loss": None}, (None, 0.5, False)),
        ({"finite": False}, (3.0, 0.5, False)),
    ],
)
def test_what_is_not_finite_becomes_null(tmp_path: Path, changed: dict, expected: tuple) -> None:
    line = RunFolder(options(tmp_path), 0).telemetry(**LINE | changed)
    assert (line["loss"], line["gnorm"], line["finite"]) == expected
    assert lines(tmp_path, "telemetry.jsonl") == [line]
    assert point_of(line).finite == expected[2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "3.0"}, "`loss` is '3.0', not a number"),
        ({"lr": True}, "`lr` is True"),
        ({"num_updates": 1.5}, "not a whole number"),
        ({"wps": float("inf")}, "`wps` is inf, not a finite number"),
        ({"finite": 1}, "`finite` is 1"),
        ({"betas": ("a",)}, "`betas` is 'a'"),
        ({"betas": 0.9}, "not a list of numbers"),
        ({"tokens": 10**400}, "`tokens` is a whole number of more than 300 digits"),
    ],
)
def test_wrong_types_are_refused(tmp_path: Path, changed: dict, said: str) -> None:
    folder = RunFolder(options(tmp_path), 0)
    with pytest.raises(TypeError, match=said):
        folder.telemetry(**LINE | changed)
    with pytest.raises(TypeError, match="a line of telemetry needs data_position"):
        folder.telemetry(**{name: value for name, value in LINE.items() if name != "data_position"})
    assert lines(tmp_path, "telemetry.jsonl") == []


@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_scalars_of_arrays_and_tensors_are_numbers(tmp_path: Path, package: str) -> None:
    module = pytest.importorskip(package)
    one = module.tensor if package == "torch" else module.float32
    given = {"loss": one(3.0), "gnorm": one(float("nan")), "num_updates": module.ones(1, dtype=module.int64)[0],
        "betas": (one(0.5), 0.25), "finite": module.isfinite(one(1.0)), "extra": {"norms": [one(0.5), one(math.inf)]},
        "count": module.ones(1, dtype=module.int64)[0]}  # fmt: skip
    line = RunFolder(options(tmp_path), 0).telemetry(**LINE | given)
    assert lines(tmp_path, "telemetry.jsonl") == [line]
    expected = {"loss": 3.0, "gnorm": None, "num_updates": 1, "betas": [0.5, 0.25], "finite": False}
    assert {name: line[name] for name in expected} == expected
    assert (line["extra"], line["count"]) == ({"norms": [0.5, None]}, 1)
    with pytest.raises(TypeError, match=r"`loss` is .*, not a number"):
        RunFolder(options(tmp_path / "b"), 0).telemetry(**LINE | {"loss": module.ones(2)})


def test_an_overflow_in_fp16_is_finite(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), 0)
    line = folder.telemetry(**LINE | {"gnorm": math.inf, "loss_scale": 1024.0})
    assert (line["gnorm"], line["finite"]) == (None, True)
    assert not folder.telemetry(**LINE | {"loss": math.nan, "loss_scale": 1024.0})["finite"]
    assert not folder.telemetry(**LINE | {"gnorm": math.inf, "loss_scale": None})["finite"]


def test_speed_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    folder = RunFolder(options(tmp_path), 0)
    folder.config(steps=9, schedule={}, optimizer={})
    bare = {name: value for name, value in LINE.items() if name not in ("step_seconds", "wps")}
    found = []
    for step, tokens in ((5, 50), (6, 60), (7, 90)):
        now[0] += 2.0
        line = folder.telemetry(**bare | {"num_updates": step, "tokens": tokens})
        found.append((line["step_seconds"], line["wps"]))
    assert found == [(2.0, 5.0), (2.0, 5.0), (2.0, 15.0)], "the first update of an attempt had 50 / 5 tokens"
    with pytest.raises(TypeError, match="needs tokens"):
        folder.telemetry(**{name: value for name, value in bare.items() if name != "tokens"})


def test_a_phase_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), 0)
    with pytest.raises(ValueError, match="no phase 'warm-up'; phases are start, tokens, training"):
        folder.phase("warm-up", 0)
    folder.phase("tokens", None)
    folder.phase("tokens", None)
    folder.phase("tokens", None, again=True)
    assert [line["phase"] for line in lines(tmp_path, "phases.jsonl")] == ["start", "tokens", "tokens"]


def test_a_configuration_may_hold_scalars_and_paths(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    folder = RunFolder(options(tmp_path), 0)
    given = {"betas": (numpy.float32(0.5), torch.tensor(0.25)), "weight_decay": 0.0, "clip_norm": 1.0}
    folder.config(steps=9, schedule={"kind": "constant", "peak_lr": 0.5}, optimizer=given, data=tmp_path)
    (written,) = [json.loads((tmp_path / "1.00/a1/config.json").read_text())]
    assert (written["optimizer"]["betas"], written["data"]) == ([0.5, 0.25], str(tmp_path))
    with pytest.raises(TypeError, match="has no form in JSON"):
        folder.config(steps=9, schedule={}, optimizer={}, model=object())
    with pytest.raises(ValueError, match="Out of range float"):
        folder.config(steps=9, schedule={"peak_lr": math.nan}, optimizer={})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), 1)
    folder.config(steps=1, schedule={}, optimizer={})
    folder.phase("training", 0)
    folder.telemetry(**LINE)
    assert not (tmp_path / "1.00").exists()


def test_a_folder_is_of_one_attempt(tmp_path: Path) -> None:
    RunFolder(options(tmp_path), 0)
    with pytest.raises(UserError, match="the telemetry of another attempt"):
        RunFolder(options(tmp_path), 0)


def test_nobody_starts_over_in_silence(tmp_path: Path) -> None:
    assert starting_point(options(tmp_path), 0) is None
    path = tmp_path / "1.00/checkpoints/step-00000005"
    path.mkdir(parents=True)
    (path / "w.bin").write_bytes(b"weights")
    write_rank(path, 0, ["w.bin"])
    header = {"step": 5, "attempt": "a1", "ts": 1.0, "layout": {"world": 1}, "data_position": 5, "tokens": 5,
        "settings_digest": "", "telemetry": {}}  # fmt: skip
    commit(path, ranks=1, deadline_seconds=5, header=header)
    with pytest.raises(UserError, match=r"holds a checkpoint of step 5: continue with --resume"):
        starting_point(options(tmp_path), 0)
    assert starting_point(options(tmp_path, from_scratch=True), 0) is None
    found = starting_point(options(tmp_path, resume=path), 0)
    assert found is not None
    assert found.step == 5
    (path / "w.bin").write_bytes(b"Weights")
    with pytest.raises(CheckpointError, match="has changed"):
        starting_point(options(tmp_path, resume=path), 0)
