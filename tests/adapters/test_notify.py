"""Alerts over real HTTP, by plain webhook and by apprise, and the dead man's switch. URLs stay secret."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from opt_ops.adapters import notify
from opt_ops.adapters.notify import DeadManSwitch, UrlNotifier, deliver, masked
from opt_ops.errors import NotDelivered
from opt_ops.ports import Alert

# apprise checks whether Python still has imghdr
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

ALERT = Alert("12:i003", "page", "lineage 12 is HALTED", "loss <b>7.1</b> & <!channel> \x1b[31m\nnode n3")


class Server:
    """Accepts every request, and answers with `status` once `gate` is open."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _take(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, self.path, json.loads(content) if content else None))
                outer.gate.wait(120)
                self.send_response(outer.status)
                if 300 <= outer.status < 400:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST = _take  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.gate.set()
    server.http.shutdown()
    server.http.server_close()


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_web_address_gets_json_whose_text_cannot_mention_anybody(server: Server):
    UrlNotifier([f"http://{server.host}/hook/s3cret"]).send(ALERT)
    ((method, path, content),) = server.requests
    assert (method, path) == ("POST", "/hook/s3cret")
    assert {name: content[name] for name in ("id", "severity", "title", "body")} == {
        "id": ALERT.id,
        "severity": "page",
        "title": ALERT.title,
        "body": ALERT.body,
    }
    assert content["text"] == (
        "[page] lineage 12 is HALTED\nloss &lt;b&gt;7.1&lt;/b&gt; &amp; &lt;!channel&gt; [31m\nnode n3"
    )


def test_apprise_gets_the_same_as_plain_text(server: Server):
    UrlNotifier([f"json://{server.host}/hook"]).send(ALERT)
    ((method, path, content),) = server.requests
    assert (method, path) == ("POST", "/hook")
    assert content["title"] == "[page] lineage 12 is HALTED"
    assert content["message"] == "loss <b>7.1</b> & <!channel> [31m\nnode n3"
    assert content["type"] == "failure"


def test_without_apprise_only_its_own_urls_fail(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "apprise", None)
    done = deliver(ALERT, [f"json://{server.host}/a", f"http://{server.host}/b"])
    assert [(d.url, d.why) for d in done] == [
        ("json://…", "needs apprise: pip install 'opt-ops[alerts]'"),
        (f"http://{server.host}/…", ""),
    ]


@pytest.mark.parametrize(
    ("least", "sent"),
    [("info", ["info", "warning", "page"]), ("warning", ["warning", "page"]), ("page", ["page"])],
)
def test_what_is_less_severe_is_not_sent(server: Server, least: Any, sent: list[str]):
    notifier = UrlNotifier([f"http://{server.host}/"], least)
    for severity in ("info", "warning", "page"):
        notifier.send(Alert(severity, severity, "t", "b"))
    assert [content["severity"] for _, _, content in server.requests] == sent


def test_an_alert_sent_again_goes_only_to_those_that_did_not_take_it(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LATER_URL", raising=False)
    notifier = UrlNotifier([f"http://{server.host}/a", "$LATER_URL"])
    for _ in range(2):
        with pytest.raises(NotDelivered, match=r"not delivered to \$LATER_URL: the environment variable LATER_URL is"):
            notifier.send(ALERT)
    monkeypatch.setenv("LATER_URL", f"http://{server.host}/b")
    notifier.send(ALERT)
    assert [path for _, path, _ in server.requests] == ["/a", "/b"]
    notifier.send(ALERT)
    assert sorted(path for _, path, _ in server.requests) == ["/a", "/a", "/b", "/b"], "a new alert to everybody"


@pytest.mark.parametrize(
    ("status", "why"), [(500, "HTTP 500 Internal Server Error"), (302, "HTTP 302 Found"), (599, "HTTP 599")]
)
def test_what_the_server_does_not_take_is_not_delivered(server: Server, status: int, why: str):
    server.status = status
    with pytest.raises(NotDelivered, match=f"…: {why}$"):
        UrlNotifier([f"http://{server.host}/"]).send(ALERT)
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer_is_not_waited_for_long(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notify, "TIMEOUT_SECONDS", 0.2)
    server.gate.clear()
    (delivery,) = deliver(ALERT, [f"http://{server.host}/"])
    assert delivery.why == "no answer in time"


@pytest.mark.parametrize(
    "url",
    [
        "http://ann:s3cret@127.0.0.1:1/s3cret?s3cret#s3cret",
        "http://127.0.0.1:1/s3cret\nx",
        "jsonn://s3cret/s3cret",
        "json://s3cret:s3cret@127.0.0.1:1/s3cret",
        "s3cret",
        "s3cret s3cret://x",
        "slack://s3cret",
        "${OPT_OPS_TEST_URL}",
        "http://127.0.0.1:1/$OPT_OPS_TEST_UNSET/s3cret",
    ],
)
def test_no_secret_is_ever_shown(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("OPT_OPS_TEST_URL", "http://127.0.0.1:1/s3cret")
    caplog.set_level(logging.DEBUG)
    logging.getLogger("apprise").disabled = False
    with pytest.raises(NotDelivered) as raised:
        UrlNotifier([url]).send(ALERT)
    switch = DeadManSwitch(url, 60)
    switch.step()
    until(lambda: "heartbeat ping to" in caplog.text)
    assert "s3cret" not in str(raised.value) + caplog.text


def test_what_apprise_raises_is_a_failure_like_any_other(server: Server, monkeypatch: pytest.MonkeyPatch):
    import apprise

    monkeypatch.setattr(apprise.Apprise, "notify", lambda *_, **__: 1 / 0)
    with pytest.raises(NotDelivered, match="json://…: ZeroDivisionError"):
        UrlNotifier([f"json://{server.host}/hook"]).send(ALERT)


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/", "http://[::1/", "http://", "http:///x", "ftp://host/x", ""])
def test_a_url_that_cannot_be_right_is_not_delivered(url: str):
    with pytest.raises(NotDelivered):
        UrlNotifier([url]).send(ALERT)


def test_a_masked_url_can_still_be_told_from_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOOK", "https://hooks.example/T0/x")
    assert masked("$HOOK") == "https://hooks.example/…"
    assert masked("mailtos://ann:pw@example.com") == "mailtos://…"
    assert masked("$OPT_OPS_TEST_UNSET") == "$OPT_OPS_TEST_UNSET"


def test_the_dead_mans_switch_pings_one_at_a_time_and_not_too_often(server: Server):
    switch = DeadManSwitch(f"http://{server.host}/ping", 0.05)
    server.gate.clear()
    switch.step()
    until(lambda: server.requests)
    time.sleep(0.1)
    switch.step()  # the first ping still runs, and this call returns at once
    assert server.requests == [("GET", "/ping", None)]
    server.gate.set()
    until(lambda: switch.step() or len(server.requests) == 2)
    seldom = DeadManSwitch(f"http://{server.host}/seldom", 3600)
    seldom.step()
    until(lambda: any(path == "/seldom" for _, path, _ in server.requests))
    until(lambda: not seldom._ping.is_alive())
    seldom.step()
    assert not seldom._ping.is_alive()


def test_a_failing_ping_is_logged_once_and_its_recovery_too(server: Server, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    server.status = 404
    switch = DeadManSwitch(f"http://{server.host}/ping", 0)
    for _ in range(3):
        switch.step()
        switch._ping.join()
    server.status = 200
    switch.step()
    switch._ping.join()
    assert [record.getMessage() for record in caplog.records] == [
        f"heartbeat ping to http://{server.host}/…: HTTP 404 Not Found",
        f"heartbeat ping to http://{server.host}/…: accepted again",
    ]


def test_without_an_address_nothing_is_pinged():
    switch = DeadManSwitch(None, 1)
    switch.step()
    assert switch._ping is None
