"""The mirror and a real MLflow server: with basic authentication, and without the interfaces of MLflow 3."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from werkzeug.security import generate_password_hash

from chronicles.mlflow_mirror import saved_view
from chronicles.mlflow_mirror.store import serve_command
from chronicles.mlflow_mirror.sync import sync
from opt_ops.errors import Unavailable
from tests.chronicles.record import LINEAGE
from tests.chronicles.server import serving
from tests.ports import free_port

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(600)]
pytestmark += [pytest.mark.usefixtures("drawn_before")]

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
        # Each request is checked against the hash, which is made to take long; one of few rounds is checked alike.
        with closing(sqlite3.connect(runs / "auth.db", timeout=60)) as database, database:
            quick = generate_password_hash(PASSWORD, method="pbkdf2:sha256:1")
            changed = database.execute("UPDATE users SET password_hash = ? WHERE username = ?", (quick, ADMIN))
            assert changed.rowcount == 1
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
    assert sorted(runs) == ["1 · opt-tiny", "1.00 · start", "1.01 · × 0.75 after 1-i003"]
    assert len(client.get_metric_history(runs["1 · opt-tiny"].info.run_id, "settled/loss")) == 600
    held = {file.path for file in client.list_artifacts(runs["1 · opt-tiny"].info.run_id, "chronicle")}
    assert "chronicle/logbook.html" in held
    assert "| COMPLETED |" in experiment.tags["mlflow.note.content"]

    ben = {"username": "ben", "password": "correct-horse-2"}
    made = requests.post(f"{secured}/api/2.0/mlflow/users/create", json=ben, auth=(ADMIN, PASSWORD), timeout=300)
    assert made.ok
    as_user(monkeypatch, USERNAME="ben", PASSWORD="correct-horse-2")
    (folder / "chronicle" / "mlflow.json").unlink()
    with pytest.raises(Unavailable, match="Permission denied") as caught:
        sync(folder, secured, "secured")
    assert "MLFLOW_TRACKING_USERNAME" in caught.value.hint, "he may read, but the experiment is another's"


@contextmanager
def without(url: str, interface: str) -> Iterator[str]:
    """A server in front of another one, of MLflow 2's version: paths with `interface` are unknown to it."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if interface in self.path:
                self._send(404, b"<!doctype html><title>404 Not Found</title>", "text/html")
            elif self.path == "/version":
                self._send(200, b"2.14.3", "text/plain")
            else:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                got = requests.request(self.command, f"{url}{self.path}", headers=headers, data=body, timeout=300)
                self._send(got.status_code, got.content, got.headers.get("Content-Type", "application/json"))

        do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815 - names of http.server

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    front = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    thread = threading.Thread(target=front.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{front.server_port}"
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


def test_a_server_of_mlflow_2_gets_the_logbook_and_no_models(
    secured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    folder = Path(shutil.copytree(LINEAGE, tmp_path / "runs" / "1"))
    as_user(monkeypatch, USERNAME=ADMIN, PASSWORD=PASSWORD)
    with without(secured, "/logged-models") as older:
        told = sync(folder, older, "older")
        assert told.endswith(f"; models left out: MLflow 2.14.3 at {older} has no interface for them")
    client = MlflowClient(tracking_uri=secured)
    experiment = client.get_experiment_by_name("older")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}, "the one that was left did not fail"
    for run in found:
        settings = [(key.rpartition(".")[2], value) for key, value in run.data.params.items()]
        assert len(settings) == len(set(settings)), "no parameter is there twice"
        assert {"ops/step", "ops/loss", "ops/goodput", "ops/incidents", "ops/tokens"} <= set(run.data.metrics)
    assert saved_view.TAG in experiment.tags
    runs = {run.info.run_name: run.info.run_id for run in found}
    held = sorted(file.path for file in client.list_artifacts(runs["1 · opt-tiny"], "chronicle"))
    assert held == ["chronicle/logbook.html", "chronicle/logbook.md", "chronicle/report.json"]
    assert len(client.get_metric_history(runs["1 · opt-tiny"], "settled/loss")) == 600
    assert not client.search_logged_models([experiment.experiment_id])
