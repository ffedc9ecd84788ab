"""The mirror and a real MLflow server with basic authentication: who may, who may not, and that nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from chronicles.logbook.render import render
from chronicles.mlflow_mirror.store import serve_command
from chronicles.mlflow_mirror.sync import sync
from opt_ops.errors import Unavailable
from tests.chronicles.record import LINEAGE
from tests.chronicles.server import serving
from tests.ports import free_port

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(600)]

ADMIN, PASSWORD = "admin", "correct-horse-1"
VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@pytest.fixture(scope="module")
def secured(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of `mlflow[auth]` where everyone may read, and write only what is theirs."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] needs Flask-WTF")
    runs = tmp_path_factory.mktemp("secured")
    (runs / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{runs}/auth.db\nadmin_username = {ADMIN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    store = f"sqlite:///{shutil.copyfile(empty_store, runs / 'mlflow.db')}"
    port = free_port()
    command, environment = serve_command(store, runs, port)
    environment |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(runs / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test alone",
    }
    with serving([*command, "--app-name", "basic-auth"], environment, f"http://127.0.0.1:{port}", runs / "log") as url:
        yield url


def as_user(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)


def test_who_may_write_does_and_who_may_not_loses_nothing(
    secured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    folder = Path(shutil.copytree(LINEAGE, tmp_path / "runs" / "1"))
    files = render(folder)
    monkeypatch.setattr("chronicles.mlflow_mirror.sync.write", lambda *_: files)  # drawing takes long
    users: tuple[dict[str, str], ...] = ({}, {"USERNAME": ADMIN, "PASSWORD": "wrong"}, {"TOKEN": "unknown"})
    for user in users:
        as_user(monkeypatch, **user)
        with pytest.raises(Unavailable, match="You are not authenticated") as caught:
            sync(folder, secured, "secured")
        assert caught.value.hint.startswith(
            "nothing is lost, because the journal has everything; set MLFLOW_TRACKING_USERNAME"
        )
        assert "wrong" not in str(caught.value)

    as_user(monkeypatch, USERNAME=ADMIN, PASSWORD=PASSWORD)
    assert sync(folder, secured, "secured").startswith("3 new runs, ")
    assert sync(folder, secured, "secured").startswith("nothing new")
    client = MlflowClient(tracking_uri=secured)
    experiment = client.get_experiment_by_name("secured")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["1", "1.00", "1.01"]
    assert len(client.get_metric_history(runs["1"].info.run_id, "settled/loss")) == 600
    files = {file.path for file in client.list_artifacts(runs["1"].info.run_id, "chronicle")}
    assert "chronicle/logbook.html" in files
    assert "| COMPLETED |" in experiment.tags["mlflow.note.content"]

    ben = {"username": "ben", "password": "correct-horse-2"}
    made = requests.post(f"{secured}/api/2.0/mlflow/users/create", json=ben, auth=(ADMIN, PASSWORD), timeout=300)
    assert made.ok
    as_user(monkeypatch, USERNAME="ben", PASSWORD="correct-horse-2")
    (folder / "chronicle" / "mlflow.json").unlink()
    with pytest.raises(Unavailable, match="Permission denied") as caught:
        sync(folder, secured, "secured")
    assert "MLFLOW_TRACKING_USERNAME" in caught.value.hint, "he may read, but the experiment is another's"
