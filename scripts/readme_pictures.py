"""Draw the README's pictures: a logbook, the simulated example, and MLflow's pages, as Chromium shows them.

    python scripts/readme_pictures.py            # the recorded run with four drills (tests/chronicles/data/1)
    python scripts/readme_pictures.py runs/1     # a run of `make demo`

The script copies the run, draws its logbook, mirrors it into a store of its own, serves MLflow on this machine, and
writes PNG files into docs/images. It needs Chromium; CHROMIUM names another one than /usr/bin/chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chronicles.logbook.render import render
from chronicles.mlflow_mirror.store import serve_command
from chronicles.mlflow_mirror.sync import sync

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images"
RECORDED = ROOT / "tests" / "chronicles" / "data" / "1"
EXAMPLE = ROOT / "chronicles" / "examples" / "opt-175b" / "logbook.html"
_FLAGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
_SECONDS = 300  # that MLflow may need until it answers


@contextmanager
def mlflow(store: str, runs: Path) -> Iterator[str]:
    """MLflow's pages of a store, at an address of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, environment = serve_command(store, runs, port)
    address = f"http://127.0.0.1:{port}"
    with (runs / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(f"{address}/health", server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit("MLflow does not answer; install opt-ops with its extra mlflow")


def picture(browser: Any, url: str, name: str, width: int, height: int, scheme: str = "light") -> None:
    """The top of a page."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(url)
    page.screenshot(path=TARGET / name)
    page.close()


def mlflow_pictures(browser: Any, address: str, lineage: str) -> None:
    """The lineage's page in MLflow, and its logbook there."""
    page = browser.new_page(viewport={"width": 1360, "height": 860})
    page.set_default_timeout(1000 * _SECONDS)
    training = "workflowType=machine_learning"
    page.goto(f"{address}/#/experiments/1/runs?{training}")
    parent = page.get_by_role("link", name=re.compile(rf"^{lineage}( |$)")).first
    parent.wait_for()
    run = parent.get_attribute("href").lstrip("/").partition("?")[0]
    page.goto(f"{address}/{run}?{training}")
    page.get_by_text("settled/loss").first.wait_for()
    page.get_by_text("About this run").wait_for()
    for close in page.get_by_role("button", name="Close").all():  # of what MLflow advertises
        close.click()
    page.screenshot(path=TARGET / "mlflow-lineage.png")
    page.goto(f"{address}/{run}/artifacts/chronicle/logbook.html?{training}")
    page.frame_locator("iframe").locator("h1").wait_for()
    path = page.get_by_text("Path: file://").first  # a temporary folder, which nobody has
    path.evaluate("element => { element.style.visibility = 'hidden' }")
    page.screenshot(path=TARGET / "mlflow-logbook.png")
    page.close()


def _rollback(folder: Path) -> str:
    """The first rollback of a lineage; else its first incident."""
    rows = json.loads((folder / "chronicle" / "report.json").read_text())["incidents"]
    return next(
        (row["incident"] for row in rows if row["action"] == "rollback"), rows[0]["incident"] if rows else "log"
    )


def main() -> None:
    """Draw all pictures."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=RECORDED, help="the folder of a lineage")
    parser.add_argument("--no-mlflow", action="store_true", help="leave out the pictures of MLflow")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as play:
        runs = Path(temporary) / "runs"
        folder = Path(shutil.copytree(given.run, runs / given.run.resolve().name))
        page = render(folder)[1].as_uri()
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = play.chromium.launch(executable_path=chromium, args=_FLAGS)
        picture(browser, page, "logbook.png", 1280, 1180)
        picture(browser, EXAMPLE.as_uri(), "logbook-175b.png", 1280, 1180)
        rollback = page + "#" + _rollback(folder)
        picture(browser, rollback, "logbook-phone.png", 390, 844, "dark")
        if not given.no_mlflow:
            store = f"sqlite:///{runs / 'mlflow.db'}"
            sync(folder, store, "opt-ops")
            with mlflow(store, runs) as address:
                mlflow_pictures(browser, address, folder.name)
        browser.close()
    for path in sorted(TARGET.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
