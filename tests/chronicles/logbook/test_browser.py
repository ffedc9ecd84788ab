"""The logbook and MLflow's pages in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chronicles.logbook.render import render
from chronicles.mlflow_mirror.store import serve_command
from chronicles.mlflow_mirror.sync import sync
from opt_ops.errors import Unavailable
from tests.chronicles.record import LINEAGE
from tests.chronicles.server import serving
from tests.ports import free_port

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Path(shutil.copytree(LINEAGE, tmp_path_factory.mktemp("page") / "1"))
    return render(folder)[1].as_uri()


def opened(browser: Any, url: str, width: int = 1280) -> tuple[Any, list[str]]:
    """A page, and everything that it complained about or asked the network for."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme="light")
    context.set_default_timeout(180_000)
    page = context.new_page()
    noise: list[str] = []
    page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: None if request.url == url else noise.append(request.url))
    page.goto(url)
    return page, noise


@pytest.fixture(scope="module")
def looked_at(browser: Any, page_file: str) -> tuple[Any, list[str]]:
    """One page for all tests that only look at it: to open one takes longer than most of them."""
    return opened(browser, page_file)


def sized(page: Any, width: int) -> Any:
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_function("width => innerWidth === width", arg=width)
    return page


@pytest.mark.parametrize(("width", "drawing"), [(1280, "wide"), (600, "middle"), (390, "narrow")])
def test_the_page_fits_is_quiet_and_asks_nobody(looked_at: tuple[Any, list[str]], width: int, drawing: str):
    page, noise = looked_at
    sized(page, width)
    assert noise == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.eval_on_selector_all(
        "svg.curves", "all => all.filter(e => e.checkVisibility()).map(e => e.classList[1])"
    )
    assert shown == [drawing]
    text = page.eval_on_selector("svg.curves:not([style]) text", "e => getComputedStyle(e).fontFamily")
    assert "system-ui" in text, "the curves are set in the page's font"


def test_on_a_phone_rows_of_tables_are_blocks_and_nothing_scrolls_sideways(looked_at: tuple[Any, list[str]]):
    page = sized(looked_at[0], 390)
    page.locator("#expand").click()
    wide = """all => all.filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
      .map(e => e.outerHTML.slice(0, 80))"""
    assert page.eval_on_selector_all(".scroll, table, pre, main", wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cell = page.locator("#runs ~ .scroll td").first
    assert cell.evaluate("e => getComputedStyle(e).display") == "block"
    assert cell.evaluate("e => getComputedStyle(e, '::before').content") == '"Run"'


def test_light_and_dark_both_read_well(looked_at: tuple[Any, list[str]]):
    page = sized(looked_at[0], 1280)
    papers = set[str]()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            """() => {
              const style = getComputedStyle(document.body);
              const of = name => { const e = document.createElement("i"); e.style.color = `var(--${name})`;
                document.body.append(e); return getComputedStyle(e).color; };
              const names = ["ink", "muted", "accent", "ok", "warn", "bad", "drill", "run-0", "run-1", "run-2",
                "run-3", "run-4", "run-5"];
              return [style.backgroundColor, Object.fromEntries(names.map(name => [name, of(name)]))];
            }"""
        )
        paper, inks = colors
        papers.add(paper)
        for name, ink in inks.items():
            wanted = 4.5 if not name.startswith("run-") else 3.0  # WCAG 2.2: text, and lines of a drawing
            assert contrast(ink, paper) >= wanted, (scheme, name, ink, paper)
    assert len(papers) == 2


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, `rgb(…)` each."""

    def luminance(color: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_links_lead_to_entries_and_back(browser: Any, page_file: str):
    page, noise = opened(browser, page_file)
    page.locator("nav.beside a", has_text="rolled back 172 steps").click()
    assert page.url.endswith("#1-i003")
    assert page.locator("article:target h3 .tag").inner_text() == "DRILL d003"
    page.locator("article:target button.zoom").click()
    assert page.locator("#chart").get_attribute("data-range") == "22 600"
    page.locator("#zoom-out").click()
    assert page.locator("#chart").get_attribute("data-range") == "1 600"
    page.locator("svg.wide a", has_text="i001").click()
    page.locator("article:target").wait_for()
    assert page.url.endswith("#1-i001")
    assert noise == []


def test_it_prints_on_white(looked_at: tuple[Any, list[str]]):
    page = sized(looked_at[0], 1280)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert not page.locator("nav.beside").is_visible()
    heading = page.locator("article h3").first.evaluate(
        "e => [getComputedStyle(e).breakInside, getComputedStyle(e).breakAfter]"
    )
    assert heading == ["avoid", "avoid"], "no heading at the foot of a sheet"
    assert page.locator(".sheet").evaluate("e => getComputedStyle(e).breakInside") == "avoid"
    assert len(page.pdf()) > 20_000
    page.emulate_media(media="screen", color_scheme="light")


# ---- MLflow --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`opt-ops mlflow open` for a store that holds the recorded lineage."""
    runs = tmp_path_factory.mktemp("site") / "runs"
    folder = Path(shutil.copytree(LINEAGE, runs / "1"))
    store = f"sqlite:///{shutil.copyfile(empty_store, runs / 'mlflow.db')}"
    sync(folder, store, "opt-ops")
    port = free_port()
    command, environment = serve_command(store, runs, port)
    with serving(command, environment, f"http://127.0.0.1:{port}", runs / "server.log") as url:
        yield url


def test_mlflow_shows_the_lineage_its_runs_and_its_logbook(browser: Any, mlflow_server: str):
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(180_000)
    page = context.new_page()
    training = "workflowType=machine_learning"
    page.goto(f"{mlflow_server}/#/experiments/1/runs?{training}")
    parent = page.get_by_role("link", name="1 · opt-tiny", exact=True).first
    parent.wait_for()
    page.goto(f"{mlflow_server}/{parent.get_attribute('href').lstrip('/')}?{training}")
    page.get_by_role("link", name="1.01").wait_for()
    assert page.get_by_role("link", name="1.00").is_visible()
    assert page.get_by_text("All 600 steps were trained").is_visible()

    assert page.get_by_text("Python standard library").first.is_visible(), "the data"
    runs = [
        link.get_attribute("href").rpartition("/")[2]
        for link in page.get_by_role("link", name=re.compile(r"1\.0\d")).all()
    ]
    lineage = page.url.split("?")[0]

    asked = {"runs": json.dumps([run.split("?")[0] for run in runs]), "experiments": '["1"]'}
    page.goto(f"{mlflow_server}/#/compare-runs?{urllib.parse.urlencode(asked)}&{training}")
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    assert page.get_by_text("1.01").first.is_visible()

    page.goto(f"{lineage}/artifacts/chronicle/logbook.html?{training}")
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="Lineage 1").wait_for()
    entry = frame.locator("article#\\31 -i003")
    assert not _in_view(entry)
    frame.locator("table a", has_text="1-i003").first.click()
    assert _in_view(entry), "links within the page lead somewhere in MLflow's frame, too"


def _in_view(entry: Any) -> bool:
    return entry.evaluate("e => e.getBoundingClientRect().top < innerHeight - 50 && e.getBoundingClientRect().top >= 0")


class _Guard(BaseHTTPRequestHandler):
    """Before a real server: wants a token, which MLflow's own app does not know, and is away when it is set to be."""

    server: Any

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked += 1
        if self.headers.get("Authorization") != self.server.welcome:
            self._answer(401, b"You are not authenticated.", "text/plain")
        elif self.server.asked in self.server.away:
            self._answer(503, b"away", "text/plain")
        else:
            request = urllib.request.Request(self.server.behind + self.path, body or None, method=self.command)
            request.add_header("Content-Type", self.headers.get("Content-Type") or "application/json")
            try:
                with urllib.request.urlopen(request, timeout=180) as answer:
                    self._answer(answer.status, answer.read(), answer.headers.get("Content-Type", ""))
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.read(), error.headers.get("Content-Type", ""))

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def guard(mlflow_server: str) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Guard)
    server.behind, server.asked, server.away = mlflow_server, 0, range(0)
    server.welcome = "Bearer token-1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(600)
def test_a_server_that_wants_a_token_and_goes_away(guard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    folder = Path(shutil.copytree(LINEAGE, tmp_path / "runs" / "1"))
    uri = f"http://127.0.0.1:{guard.server_port}"
    with pytest.raises(Unavailable) as caught:
        sync(folder, uri, "secured")
    assert "MLFLOW_TRACKING_TOKEN" in caught.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-1")
    guard.away = range(guard.asked + 8, 10**9)  # gone in the middle
    with pytest.raises(Unavailable, match="did not accept the chronicle"):
        sync(folder, uri, "secured")
    guard.away = range(0)  # hours later
    sync(folder, uri, "secured")
    assert sync(folder, uri, "secured").startswith("nothing new")
    client = MlflowClient(tracking_uri=guard.behind)
    experiment = client.get_experiment_by_name("secured")
    assert experiment is not None
    runs = {run.info.run_name.partition(" ")[0]: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["1", "1.00", "1.01"]
    assert len(client.get_metric_history(runs["1"].info.run_id, "settled/loss")) == 600
    assert "token-1" not in (folder / "chronicle" / "mlflow.json").read_text()
