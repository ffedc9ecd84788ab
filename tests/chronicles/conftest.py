"""Lineages for the chronicle's tests, a store of MLflow that is made once, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]


@pytest.fixture
def lineage(tmp_path: Path) -> Path:
    """The recorded lineage: three nodes, four drills, a rollback, completed."""
    return Path(shutil.copytree(LINEAGE, tmp_path / "runs" / "1"))


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """A lineage that a test tells."""
    return Told(tmp_path / "runs" / "12")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite store; making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    """The tracking URI of a fresh store."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    path = Path(shutil.copyfile(empty_store, tmp_path / "runs" / "mlflow.db"))
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The chronicle of the recorded lineage."""
    from chronicles.logbook.render import render

    return render(Path(shutil.copytree(LINEAGE, tmp_path_factory.mktemp("drawn") / "1")))


@pytest.fixture
def drawn_before(drawn: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to MLflow has that chronicle: drawing it takes longer than all the rest."""

    def written(folder: Path, *_: Any) -> list[Path]:
        (folder / "chronicle").mkdir(exist_ok=True)
        return drawn

    monkeypatch.setattr("chronicles.mlflow_mirror.sync.write", written)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window. While it is there, nothing else in this process can run an event loop."""
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, timeout=180_000)
        yield chromium
        chromium.close()
