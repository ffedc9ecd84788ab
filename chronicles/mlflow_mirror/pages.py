"""The addresses of MLflow's pages, from what a sync left in the cursor: MLflow itself is not asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from chronicles.logbook.render import FOLDER
from chronicles.mlflow_mirror.cursor import Cursor, store_name
from chronicles.mlflow_mirror.saved_view import VIEW
from chronicles.mlflow_mirror.store import is_server, without_passwords
from opt_ops.errors import Unavailable

PORT = 5000  # at which `opt-ops mlflow open` serves, unless it is told another one

TRAINING = "workflowType=machine_learning"  # the menu for training; without it, MLflow 3 shows that for agents


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The store that the configuration names, and the experiment in it."""

    uri: str
    experiment: str

    def pages(self, port: int = PORT) -> str:
        """Where its pages are: at the server, or where `opt-ops mlflow open` serves them."""
        served = without_passwords(self.uri).rstrip("/") if is_server(self.uri) else f"http://127.0.0.1:{port}"
        return f"{served}/#"


def was_sent(folder: Path, store: Store) -> bool:
    """Whether a sync has sent the lineage to this store."""
    cursor = _cursor(folder, store)
    return bool(cursor.experiment) and "" in cursor.runs


def lineage_page(folder: Path, store: Store, port: int = PORT) -> str:
    """The page of a lineage's run.

    Raises:
        Unavailable: it was never sent to this store.
    """
    experiment, run = _sent(folder, store)
    return f"{store.pages(port)}/experiments/{experiment}/runs/{run}?{TRAINING}"


def experiment_page(folder: Path, store: Store, port: int = PORT) -> str:
    """The page of all lineages in the experiment that this lineage is in, in the saved view.

    Raises:
        Unavailable: the lineage was never sent to this store.
    """
    experiment, _ = _sent(folder, store)
    return f"{store.pages(port)}/experiments/{experiment}/runs?viewStateShareKey={VIEW}&{TRAINING}"


def compare_link(a: Path, b: Path, store: Store) -> str:
    """The address of MLflow's page that compares the runs of two lineages.

    Raises:
        Unavailable: one of them was never sent to this store.
    """
    (experiment, first), (_, second) = _sent(a, store), _sent(b, store)
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in ([first, second], [experiment]))
    return f"{store.pages()}/compare-runs?runs={runs}&experiments={experiments}"


def _sent(folder: Path, store: Store) -> tuple[str, str]:
    """The ids of the experiment and of the lineage's run."""
    cursor = _cursor(folder, store)
    if not was_sent(folder, store):
        where = without_passwords(store.uri)
        raise Unavailable(
            f"lineage {folder.name} was not sent to {where} yet", f"send it with opt-ops mlflow sync {folder.name}"
        )
    return cursor.experiment, cursor.runs[""]


def _cursor(folder: Path, store: Store) -> Cursor:
    return Cursor(folder / FOLDER / "mlflow.json", store_name(store.uri, store.experiment))
