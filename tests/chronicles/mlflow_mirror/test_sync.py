"""The mirror in a real MLflow store: the same content however often, whenever and after whatever it is sent."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chronicles.mlflow_mirror.experiment_note import SIGNED, MirroredLineage, experiment_note
from chronicles.mlflow_mirror.store import lineage_lock, serve_command
from chronicles.mlflow_mirror.sync import sync
from chronicles.record import load
from opt_ops.core.events import LineageCompleted, LineageHalted
from opt_ops.core.values import Action, Outcome
from opt_ops.errors import OptOpsError, Unavailable
from tests.chronicles.told import Told

# MLflow's own use of SQLAlchemy and alembic, not ours
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Content = dict[str, Any]


def content(uri: str, experiment: str = "opt-ops") -> Content:
    """Everything that the store holds of an experiment's runs, by their names."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    names = {run.info.run_id: run.data.tags.get("opt.run") or run.data.tags["opt.lineage"] for run in runs}
    content: Content = {}
    for run in runs:
        tags = dict(run.data.tags)
        tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId"))
        for identity, name in names.items():  # a run's description leads to others
            tags["mlflow.note.content"] = tags["mlflow.note.content"].replace(identity, name)
        content.setdefault(names[run.info.run_id], []).append(
            {
                "name": run.info.run_name,
                "status": run.info.status,
                "times": (run.info.start_time, run.info.end_time),
                "tags": tags,
                "params": dict(run.data.params),
                "metrics": {
                    key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key))
                    for key in run.data.metrics
                },
                "data": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
                "models": sorted(
                    (model.name, model.params["step"], str(model.status))
                    for model in client.search_logged_models([found.experiment_id])
                    if model.source_run_id == run.info.run_id
                ),
                "files": sorted(file.path for file in client.list_artifacts(run.info.run_id, "chronicle")),
            }
        )
    return content


FILES = ["chronicle/logbook.html", "chronicle/logbook.md", "chronicle/report.json"]


def test_a_lineage_in_mlflow(lineage: Path, store: str):
    assert sync(lineage, store, "opt-ops").startswith("3 new runs, ")
    held = content(store)
    ((parent,), (first,), (second,)) = held["1"], held["1.00"], held["1.01"]
    assert [run["tags"]["mlflow.parentRunId"] for run in (parent, first, second)] == [None, "1", "1"]
    assert [run["status"] for run in (parent, first, second)] == ["FINISHED", "FINISHED", "FINISHED"]
    assert [run["name"] for run in (parent, first, second)] == [
        "1 · opt-tiny",
        "1.00 · start",
        "1.01 · × 0.75 after 1-i003",
    ]
    assert first["tags"]["mlflow.note.content"].startswith(
        "Left at 322 for [1.01](#/experiments/1/runs/1.01), back to 150, because of "
        "[1-i003](#/experiments/1/runs/1.00/artifacts/chronicle/logbook.html#1-i003): loss spike (a drill). 172 steps"
    )
    assert [run["files"] for run in (parent, first, second)] == [FILES, FILES, FILES]
    assert parent["times"] == (1795356979300, 1795357119825)
    steps = [step for step, _, _ in parent["metrics"]["settled/loss"]]
    assert steps == list(range(1, 601)), "each step once"
    assert [value for step, _, value in parent["metrics"]["settled/lr"] if step == 151] == [0.0006362500000000001]
    assert len(first["metrics"]["loss"]) == 361, "what really happened, repeated steps and the spike among it"
    assert max(value for _, _, value in first["metrics"]["lr"]) == 0.0325, "the drill's learning rate"
    assert second["metrics"]["ops/tokens"][-1][0] == second["metrics"]["loss"][-1][0] == 600
    assert {"ops/step", "ops/goodput", "ops/incidents", "ops/nodes"} <= set(first["metrics"])
    assert second["params"]["optim.peak_lr"] == "0.001"
    assert first["data"] == [("Python standard library", "a8ae9538ec653afd007064f9585729f4525f")]
    assert [int(step) for _, step, _ in first["models"]] == [100, 150]
    steps_of = [int(step) for _, step, _ in second["models"]]
    assert sorted(steps_of) == [200, 250, 300, 400, 450, 500, 550, 600], "the first good one of every tenth"
    assert "**COMPLETED.**" in parent["tags"]["mlflow.note.content"]
    kept = (lineage.parent / "mlartifacts" / "opt-ops").glob("*/artifacts/chronicle/logbook.html")
    assert len(list(kept)) == 3, "beside the store, not below whatever folder the sync ran in"


@pytest.mark.usefixtures("drawn_before")
def test_sending_again_changes_nothing(lineage: Path, store: str):
    sync(lineage, store, "opt-ops")
    before = content(store)
    assert sync(lineage, store, "opt-ops").startswith("nothing new")
    assert content(store) == before
    (lineage / "chronicle" / "mlflow.json").unlink()
    assert sync(lineage, store, "opt-ops").startswith("0 new runs, ")
    assert content(store) == before
    (lineage / "chronicle" / "mlflow.json").write_text("{ torn")
    sync(lineage, store, "opt-ops")
    assert content(store) == before


class Killed(BaseException):
    """Nothing of ours may catch it."""


def deadly_call(real: Callable[..., Any], last: int, deaths: list[str]) -> Callable[..., Any]:
    """The method, but its `last` call kills: the store is changed then, the cursor is not."""
    left = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        answer = real(*arguments, **named)
        if next(left) == last:
            deaths.append(real.__name__)
            raise Killed
        return answer

    return call


@pytest.mark.usefixtures("drawn_before")
def test_killed_after_any_call_it_goes_on(
    lineage: Path, store: str, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    names = ("create_experiment", "create_run", "log_batch", "set_terminated", "log_artifact")
    names += ("log_inputs", "create_logged_model", "finalize_logged_model")  # in the order of calls
    names += ("set_experiment_tag",)
    deaths: list[str] = []
    for number, name in itertools.product((1, 2, 4), names):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(MlflowClient, name, deadly_call(getattr(MlflowClient, name), number, deaths))
            sync(lineage, store, "opt-ops")
    assert set(deaths) == set(names)
    sync(lineage, store, "opt-ops")
    other = f"sqlite:///{shutil.copyfile(empty_store, tmp_path / 'other.db')}"
    sync(lineage, other, "opt-ops")
    assert content(store) == content(other)


def test_sent_while_it_happened_or_at_the_end(tmp_path: Path, store: str, empty_store: Path):
    def send() -> None:
        sync(told.folder, store, "opt-ops")

    told = Told(tmp_path / "runs" / "12").begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 55)
    send()
    told.train("12.00-a0", 56, 200)
    point = told.save("12.00", 100)
    told.save("12.00", 150)
    send()
    incident = told.incident("loss_spike", "loss 9.1 at step 200", "12.00-a0", 200, onset_step=160)
    told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=0.5)
    send()
    told.end("12.00-a0", Outcome.STOPPED, 200)
    told.plan("12.01", "12.00", point, [(100, 0.5)], incident, cause="loss 9.1 at step 200")
    send()
    told.launch("12.01-a0", point, incident).train("12.01-a0", 101, 400).close(incident)
    send()
    told.end("12.01-a0", Outcome.COMPLETED, 400).see(LineageCompleted(step=400))
    send()
    late = f"sqlite:///{shutil.copyfile(empty_store, tmp_path / 'late.db')}"
    sync(told.folder, late, "opt-ops")

    ours, theirs = content(store), content(late)
    (left,), (same,) = ours["12.00"], theirs["12.00"]
    assert {**left, "files": 0, "models": 0} == {**same, "files": 0, "models": 0}
    assert [step for _, step, _ in left["models"]] == ["100", "150"], "150 was kept when it was sent"
    assert [step for _, step, _ in same["models"]] == ["100"]
    assert ours["12.01"] == theirs["12.01"]
    (parent,), (other,) = ours["12"], theirs["12"]
    extra = set(parent["metrics"]["settled/loss"]) - set(other["metrics"]["settled/loss"])
    assert {step for step, _, _ in extra} == set(range(101, 151)), "kept when it was sent, and discarded since"
    assert set(other["metrics"]["settled/loss"]) < set(parent["metrics"]["settled/loss"])
    assert {**parent, "metrics": 0} == {**other, "metrics": 0}


def test_lineages_of_one_number_from_two_places_stay_apart(tmp_path: Path, store: str):
    for who in ("ann", "ben"):
        told = Told(tmp_path / who / "12").begin(author=who).plan("12.00")
        sync(told.folder, store, "opt-ops")
    held = content(store)
    assert sorted(run["tags"]["mlflow.user"] for run in held["12"]) == ["ann", "ben"]
    assert len(held["12.00"]) == 2


@pytest.mark.usefixtures("drawn_before")
def test_a_run_that_someone_deleted_is_made_anew(lineage: Path, store: str):
    from mlflow import MlflowClient

    sync(lineage, store, "opt-ops")
    before = content(store)
    client = MlflowClient(tracking_uri=store)
    (cursor,) = json.loads((lineage / "chronicle" / "mlflow.json").read_text())["stores"].values()
    client.delete_run(cursor["runs"]["1.01"])
    sync(lineage, store, "opt-ops")
    assert content(store) == before


def described(uri: str) -> str:
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=uri).get_experiment_by_name("opt-ops")
    assert found is not None
    return found.tags["mlflow.note.content"]


@pytest.mark.usefixtures("drawn_before")
def test_the_experiment_has_a_front_page_of_all_its_lineages(tmp_path: Path, store: str, lineage: Path):
    from mlflow import MlflowClient

    sync(lineage, store, "opt-ops")
    told = Told(tmp_path / "12").begin(author="<b>eve</b> | x").plan("12.00")
    sync(told.folder, store, "opt-ops")
    note = described(store)
    assert re.search(
        r"^\| \[1\]\(#/experiments/1/runs/\w{32}\?\S+\) \| opt-tiny \| ann \| COMPLETED \| 600 \|", note, re.MULTILINE
    )
    assert r"\<b\>eve\</b\> \| x" in note
    assert not note.startswith("|"), "MLflow shows the first line alone until somebody opens it"
    newest = "12" if load(told.folder).started > load(lineage).started else "1"  # type: ignore[operator]
    assert f"\n## Lineage {newest}\n" in note
    sync(lineage, store, "opt-ops")
    assert described(store) == note, "whoever is the last to send"

    client = MlflowClient(tracking_uri=store)
    client.set_experiment_tag("1", "mlflow.note.content", "ours, by hand")
    sync(told.folder, store, "opt-ops")
    assert described(store) == "ours, by hand"


def test_the_experiments_front_page_fits():
    first = MirroredLineage(
        run_id="0" * 32,
        lineage="1",
        recipe="r" * 500,
        author="",
        status="",
        step="",
        goodput="",
        incidents="",
        note="n" * 7900,
    )
    lineages = [replace(first, step=str(number)) for number in range(40)]
    note = experiment_note(lineages, lambda run: f"#/{run}", 19_000)
    assert 18_000 < len(note) <= 19_000
    assert note.endswith(SIGNED)
    assert "| 0 |" in note
    assert "| 39 |" not in note


def test_a_halted_lineage_and_one_that_goes_on(told: Told, store: str):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 10)
    sync(told.folder, store, "opt-ops")
    assert content(store)["12"][0]["status"] == "RUNNING"
    told.end("12.00-a0", Outcome.FAILED, 10).see(LineageHalted(why="no rule fits", incident=None))
    sync(told.folder, store, "opt-ops")
    held = content(store)["12"][0]
    assert (held["status"], held["tags"]["opt.cause"]) == ("FAILED", "no rule fits")


def test_a_lineage_that_nobody_has_started_is_not_sent(tmp_path: Path):
    assert sync(tmp_path, "sqlite:////nowhere/mlflow.db", "opt-ops") == "nothing is journaled yet"


@pytest.mark.usefixtures("drawn_before")
def test_a_deleted_experiment_is_not_written_to(lineage: Path, store: str):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    client.delete_experiment(client.create_experiment("opt-ops"))
    with pytest.raises(OptOpsError, match="experiment opt-ops is deleted") as caught:
        sync(lineage, store, "opt-ops")
    assert "mlflow experiments restore" in caught.value.hint


@pytest.mark.usefixtures("drawn_before")
def test_two_syncs_at_once_are_refused(lineage: Path, store: str):
    with lineage_lock(_chronicle(lineage)), pytest.raises(Unavailable, match="another sync of lineage 1"):
        sync(lineage, store, "opt-ops")


def _chronicle(folder: Path) -> Path:
    (folder / "chronicle").mkdir()
    return folder


_SOON = 120  # seconds, on a busy machine; MLflow by itself tries for longer


@pytest.mark.usefixtures("drawn_before")
def test_a_server_that_is_down_fails_soon_and_loses_nothing(lineage: Path, store: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        uri = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unavailable, match="did not accept the chronicle") as caught:
            sync(lineage, uri, "opt-ops")
        assert time.monotonic() - began < _SOON
    assert "nothing is lost" in caught.value.hint
    assert "secret" not in str(caught.value)
    assert sync(lineage, store, "opt-ops").startswith("3 new runs")
    assert "secret" not in (lineage / "chronicle" / "mlflow.json").read_text()


def test_a_database_out_of_reach_fails_soon(lineage: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not accept the chronicle"):
        sync(lineage, f"sqlite:///{tmp_path}/file/mlflow.db", "opt-ops")
    assert time.monotonic() - began < _SOON


def test_a_database_without_its_driver_says_what_is_missing(lineage: Path):
    with pytest.raises(OptOpsError, match="needs the module pyodbc") as caught:
        sync(lineage, "mssql+pyodbc://user:secret@127.0.0.1:1/mlflow", "opt-ops")
    assert "secret" not in str(caught.value)


def test_serving_a_store(tmp_path: Path):
    command, environment = serve_command("sqlite:////runs/mlflow.db", tmp_path / "runs", 5001)
    assert command[1:4] == ["-m", "mlflow", "server"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
    assert command[command.index("--artifacts-destination") + 1] == str(tmp_path / "runs" / "mlartifacts")
    assert environment == {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def test_a_server_needs_no_serving(tmp_path: Path):
    with pytest.raises(OptOpsError, match="nothing to serve"):
        serve_command("https://user:secret@mlflow.example.org", tmp_path, 5001)
