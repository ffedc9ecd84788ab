"""Scores in a real MLflow store: every one on its run, settled ones on the lineage's, whoever is killed when."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from chronicles.mlflow_mirror.scores import score_samples
from chronicles.mlflow_mirror.sync import sync
from chronicles.record import load
from chronicles.report.build import build
from tests.chronicles.mlflow_mirror.test_sync import Killed, content, deadly_call
from tests.chronicles.told import Told

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def evaluated(folder: Path) -> Told:
    """Trained to 200, evaluated at 50, 100 and 150."""
    told = Told(folder).begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    for step in (50, 100, 150):
        told.save("12.00", step)
        told.evaluated(step, value=step / 1000)
        told.evaluated(step, task="lambada_openai", metric="perplexity", value=30 - step / 10)
    return told


def rolled_back(told: Told) -> Told:
    """To 100; then evaluated at 150 again."""
    point = next(k.checkpoint for k in told.state.checkpoints.values() if k.checkpoint.step == 100)
    told.plan("12.01", "12.00", point, [(100, 0.5)]).launch("12.01-a0", point).train("12.01-a0", 101, 250)
    told.save("12.01", 150)
    return told.evaluated(150, value=0.2)


def scores(held: dict[str, Any], run: str, key: str = "eval/hellaswag/acc_norm") -> list[tuple[int, float]]:
    (found,) = held[run]
    return [(step, value) for step, _, value in found["metrics"].get(key, ())]


def test_every_score_is_on_its_run_and_settled_ones_on_that_of_the_lineage(tmp_path: Path, store: str):
    told = rolled_back(evaluated(tmp_path / "runs" / "12"))
    sync(told.folder, store, "opt-ops")
    held = content(store)
    assert scores(held, "12.00") == [(50, 0.05), (100, 0.1), (150, 0.15)], "what was taken back stays here"
    assert scores(held, "12.01") == [(150, 0.2)]
    assert scores(held, "12") == [(50, 0.05), (100, 0.1), (150, 0.2)], "the rollback took 0.15 back"
    assert scores(held, "12", "eval/lambada_openai/perplexity") == [(50, 25.0), (100, 20.0)]
    assert sync(told.folder, store, "opt-ops").startswith("nothing new")
    (told.folder / "chronicle" / "mlflow.json").unlink()
    sync(told.folder, store, "opt-ops")
    assert content(store) == held, "the cursor only saves work"


def test_sent_before_the_rollback_or_after_it(tmp_path: Path, store: str):
    told = evaluated(tmp_path / "runs" / "12")
    sync(told.folder, store, "opt-ops")
    assert scores(content(store), "12") == [(50, 0.05), (100, 0.1), (150, 0.15)]
    rolled_back(told)
    sync(told.folder, store, "opt-ops")
    assert scores(content(store), "12") == [(50, 0.05), (100, 0.1), (150, 0.15), (150, 0.2)], (
        "MLflow cannot delete a point; the one that replaces it has a later time"
    )
    assert scores(content(store), "12.01") == [(150, 0.2)]


def test_killed_after_any_call_every_score_is_there_once(
    tmp_path: Path, store: str, empty_store: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    told = rolled_back(evaluated(tmp_path / "runs" / "12"))
    deaths: list[str] = []
    for last in range(1, 8):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(MlflowClient, "log_batch", deadly_call(MlflowClient.log_batch, last, deaths))
            sync(told.folder, store, "opt-ops")
    assert len(deaths) > 3
    sync(told.folder, store, "opt-ops")
    other = f"sqlite:///{shutil.copyfile(empty_store, tmp_path / 'other.db')}"
    sync(told.folder, other, "opt-ops")
    for run in ("12", "12.00", "12.01"):
        assert scores(content(store), run) == scores(content(other), run)


def test_behind_the_newest_good_checkpoint_nothing_is_settled(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    told.save("12.00", 50)
    told.evaluated(50).evaluated(100)
    record = load(told.folder)
    found = score_samples(build(record), record.state)
    assert [sample.step for sample in found[""]] == [50]
    assert [sample.step for sample in found["12.00"]] == [50, 100]


def test_only_what_was_measured_in_the_same_way_is_on_one_curve(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    limited = "1.0 first 200"
    ways = ({"task_version": limited}, {"shots": 5}, {}, {"shots": 5, "task_version": limited})
    others = ({"task_version": "2.0"}, {"harness": "lm-eval 0.5"}, {"task": "hella:swag"}, {"task": "hella/swag"})
    for step in (50, 100):
        for way in (*ways, *others):
            told.evaluated(step, **way)
    record = load(told.folder)
    found = [sample.key for sample in score_samples(build(record), record.state)["12.00"]]
    name = "eval/hellaswag/acc_norm"
    assert found[:4] == [f"{name}/first-200", f"{name}/5-shot", name, f"{name}/5-shot/first-200"]
    assert found[:8] == found[8:], "whichever came first"
    assert len(set(found)) == len(ways) + len(others)
    assert found[4].startswith(f"{name}/lm-eval 0.4.13_ task version 2.0 ")


def test_names_are_what_mlflow_takes(told: Told, store: str):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    for version in ("1.0", "2.0"):
        told.evaluated(100, task="../a<b>:$" * 30, metric="x/y" * 80, task_version=f"{version * 80} first {10**11}")
    record = load(told.folder)
    sync(told.folder, store, "opt-ops")
    assert len(score_samples(build(record), record.state)["12.00"]) == 2
    (run,) = content(store)["12.00"]
    found = [key for key in run["metrics"] if key.startswith("eval/")]
    assert len(found) == 2
