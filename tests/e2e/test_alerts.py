"""Alerts: a real daemon, and a real web server that receives them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.state.model import Status
from tests.e2e.site import Site, until


class Pager(ThreadingHTTPServer):
    """Receives alerts. It refuses the next `refuse` of them."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refuse = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Pager

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(503 if self.server.refuse > 0 else 200)
        self.end_headers()
        if self.server.refuse > 0:
            self.server.refuse -= 1
        else:
            self.server.taken.append(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()
    yield pager
    pager.shutdown()
    pager.server_close()


@pytest.fixture
def site(tmp_path: Path, pager: Pager) -> Iterator[Site]:
    alerts = f"[alerts]\nurls = ['http://127.0.0.1:{pager.server_port}/hook']\nleast = 'info'"
    site = Site(tmp_path, alerts)
    yield site
    site.close()


def test_one_message_for_an_incident_one_for_its_end_and_a_page_when_it_halts(site: Site, pager: Pager):
    site.start("steps=100", "misbehave=die@55:1.00-a0,exit-78@75:1.00-a1")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.HALTED
    told = [(alert["id"].partition("/")[2].split("/")[0], alert["severity"]) for alert in pager.taken]
    assert sorted(told) == sorted([("opened", "warning"), ("closed", "info"), ("halted", "page")])
    page = next(alert for alert in pager.taken if alert["severity"] == "page")
    assert "settings rejected" in page["body"], page["body"]
    assert "opt-ops run resume 1" in page["body"]
    assert all(alert.delivered for alert in state.alerts.values())


def test_a_pager_that_is_away_holds_nothing_up(site: Site, pager: Pager):
    pager.refuse = 1000
    site.start("steps=120", "misbehave=die@55:1.00-a0")
    site.start_daemon()
    state = site.wait(lambda state: state.status is Status.COMPLETED and state)
    assert not state.finished, "the alerts are still to be delivered"
    assert pager.taken == []


def test_a_lineage_that_nobody_watches_any_more_is_a_page(site: Site, pager: Pager):
    site.start("steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 1)
    site.kill_daemon()
    path = site.runs / "1" / "journal" / "000001.jsonl"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"stub", b"stab", 1))
    pager.taken.clear()
    site.start_daemon()
    until(lambda: pager.taken)
    path.write_bytes(sound)
    assert [alert["severity"] for alert in pager.taken] == ["page"]
    assert "not watched" in pager.taken[0]["title"]
    assert "fails its checksum" in pager.taken[0]["body"]
