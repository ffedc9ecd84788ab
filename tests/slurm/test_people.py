"""People: somebody cancels the job, a human is called, and what operators ask for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opt_ops.core.state.status import Status
from tests.e2e.site import Site
from tests.slurm.day import Day, ask, until

pytestmark = pytest.mark.slurm


def job(day: Day) -> str:
    return str(day.state.live_allocations[0].job)


def test_somebody_cancels_the_job(site: Site):
    day = Day(site)
    ask("scancel", job(day))
    cancelled = day.sees("job_cancelled")
    assert "CANCELLED" in cancelled.cause
    day.trained(20)
    ask("scancel", job(day))
    state = site.ended()
    assert state.status is Status.HALTED
    assert "budget of job_cancelled" in state.why
    assert [i.kind for i in state.incidents.values()] == ["job_cancelled", "job_cancelled"]
    day.accounts(2)  # with a test's patience, new nodes may be asked for while the second job still completes


@pytest.fixture
def pager() -> Iterator[tuple[int, list[dict]]]:
    """A port, and what was sent there."""
    taken: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], taken
        server.shutdown()


@pytest.mark.soak  # in every run: e2e/test_scenarios.py and e2e/test_alerts.py
def test_the_same_death_at_the_same_step_calls_a_human(site: Site, pager: tuple[int, list[dict]]):
    port, taken = pager
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text() + f'[alerts]\nurls = ["http://127.0.0.1:{port}/page"]\n')
    deaths = ",".join(f"exit-9@45:1.00-a{n}" for n in range(9))
    site.start("steps=10000", f"misbehave={deaths}")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.HALTED
    kinds = [incident.kind for incident in state.incidents.values()]
    assert kinds == ["process_death"] * 4
    excluded = [name for name, node in state.nodes.items() if node.excluded_by]
    assert excluded == [state.attempts["1.00-a1"].nodes[1]], "the second time, without the node of the rank that fell"
    page = next(alert for alert in taken if alert["severity"] == "page")
    assert page["title"] == "opt-ops 1: HALTED, a human is needed"
    assert all(f"1-i00{number}, rank died: restart" in page["body"] for number in range(3)), page["body"]
    assert "Next: opt-ops run explain 1" in page["body"]


@pytest.mark.soak  # in every run: e2e/test_people.py; scenarios/test_everywhere.py asks on a Slurm
def test_what_operators_ask_for(site: Site):
    day = Day(site)

    def do(*command: str) -> None:
        site.command("run", *command, "--yes", "-q", "--author", "ann")

    do("pause", "1", "--reason", "power work")
    site.wait(lambda state: state.status is Status.PAUSED and not state.live_allocations)
    saved = max(known.checkpoint.step for known in day.state.checkpoints.values() if known.good)
    assert saved >= day.saved_before_it_left(day.attempt)
    do("resume", "1")
    site.wait(lambda state: state.status is Status.TRAINING and len(state.attempts) == 2)
    assert day.state.attempt.first_step == saved + 1

    do("set", "1", "clip=0.5")
    changed = day.sees("operator")
    assert changed.cause == "ann: set by hand"
    assert day.state.attempt.readbacks[0].clip_norm == 0.5

    day.trained(20)
    do("rollback", "1", "--to", str(saved))
    back = day.sees("operator")
    assert back.step_resumed <= saved

    do("take-over", "1")
    site.wait(lambda state: state.driver == "person")
    attempts = len(day.state.attempts)
    site.fault("die")
    day.expected.append("process_death")
    advice = site.wait(lambda s: next((i for i in s.incidents.values() if i.kind == "process_death" and i.decision), 0))
    assert advice.decision.advice
    site.looked(seconds=3)
    assert len(day.state.attempts) == attempts, "the daemon only says what it would do"
    do("hand-back", "1")
    until(lambda: day.state.driver == "daemon")
    if day.state.attempt.live is False:
        do("resume", "1")
    day.trained(20)
