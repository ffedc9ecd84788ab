"""MLflow's store: its address, the server for it, and what a sync needs before it can begin."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chronicles.logbook.render import FOLDER
from opt_ops.contract.files import open_append
from opt_ops.errors import OptOpsError, Unavailable, UsageError

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

# By MLflow's defaults, a server that is down blocks a caller for many minutes. The user's settings have precedence.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def serve_command(tracking_uri: str, runs: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """The command and environment that serve MLflow's pages for a store, on this machine only.

    Raises:
        UsageError: the store is a server already.
    """
    if is_server(tracking_uri):
        where = without_passwords(tracking_uri)
        raise UsageError(f"MLflow is a server already, at {where}: there is nothing to serve", "opt-ops mlflow link")
    if _scheme(tracking_uri) == "sqlite":
        runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server"]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if without_passwords(tracking_uri) == tracking_uri:
        command += ["--backend-store-uri", tracking_uri]
    else:  # ps shows arguments to everybody, and a process's environment to its user alone
        environment["MLFLOW_BACKEND_STORE_URI"] = tracking_uri
    command += ["--artifacts-destination", str(artifact_folder(runs))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, environment


@contextmanager
def lineage_lock(folder: Path) -> Iterator[None]:
    """Hold the lineage's lock: two syncs at once would create every run twice.

    Raises:
        Unavailable: another sync of the lineage holds it.
    """
    with open_append(folder / FOLDER / ".mlflow.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(
                f"another sync of lineage {folder.name} is running",
                f"opt-ops mlflow sync {folder.name}, once it has ended",
            ) from error
        yield


@contextmanager
def default_environment() -> Iterator[None]:
    """Set the environment for MLflow's client, where the user has set nothing."""
    added = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def probe_database(uri: str) -> None:
    """Fail at once if the store is a database that is out of reach: MLflow itself would try for minutes.

    Raises:
        OptOpsError: the database's driver is not installed.
        SQLAlchemyError: the database does not answer.
    """
    if not _scheme(uri).startswith(_DATABASES):
        return
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        engine = sqlalchemy.create_engine(url)
    except ImportError as error:
        where = without_passwords(uri)
        raise OptOpsError(
            f"MLflow's store {where} needs the module {error.name}", f"pip install {error.name}"
        ) from error
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def is_server(uri: str) -> bool:
    """Whether the store is a server, and no database or folder."""
    return _scheme(uri) in ("http", "https")


def server_name(uri: str) -> str:
    """The server with its version, if it tells one: `MLflow 2.14.3 at http://…`."""
    import requests

    where = without_passwords(uri)
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", timeout=10)
    except requests.RequestException:
        return f"MLflow at {where}"
    version = answer.text.strip() if answer.ok else ""
    known = re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", version)
    return f"MLflow {version} at {where}" if known else f"MLflow at {where}"


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].lower()


def without_passwords(text: str) -> str:
    """The text without the user names and passwords of its URIs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def artifact_folder(runs: Path) -> Path:
    """Where files are kept if the store is no server."""
    return runs / "mlartifacts"
