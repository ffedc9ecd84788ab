"""Jobs that end under the training, and a Slurm that does not answer; what operators ask for."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import AllocationStatus
from tests.e2e.site import Site
from tests.slurm.day import CONFIG, Day, ask, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def job(day: Day) -> str:
    return str(day.state.live_allocations[0].job)


def test_slurm_does_not_answer(site: Site, slurm: Cluster, tmp_path: Path):
    bin_, hangs = tmp_path / "bin", tmp_path / "hangs"
    bin_.mkdir()
    squeue = f"if [ -e '{hangs}' ]; then while [ -e '{hangs}' ]; do sleep 0.1; done; exit 1; fi"
    (bin_ / "squeue").write_text(f'#!/bin/sh\n{squeue}\nexec {shutil.which("squeue")} "$@"\n')
    (bin_ / "squeue").chmod(0o755)
    # Without an end to the daemon's patience: what it does meanwhile, it does without an answer.
    patient = (
        "from opt_ops.adapters.slurm import command, questions;"
        "command.TIMEOUT_SECONDS = 3600.0; questions.STALE_SECONDS = 10.0"
    )
    day = Day(site, path=f"{bin_}:{slurm.env['PATH']}", first=patient)
    ours = job(day)

    def unanswered() -> bool:
        changes = [x.event for x in site.entries() if isinstance(x.event, e.AllocationChanged)]
        return changes[-1].status is AllocationStatus.UNKNOWN

    slurm.stop("slurmctld")
    until(unanswered)
    day.fault("die", "process_death")  # nothing of a recovery inside the allocation needs slurmctld
    slurm.start("slurmctld")
    until(lambda: not unanswered())

    day.settled()
    slurm.stop("slurmdbd")
    day.fault("die", "process_death")
    slurm.start("slurmdbd")

    day.settled()
    hangs.touch()  # nobody says anything
    until(unanswered)
    day.fault("die", "process_death")  # whoever does not answer holds up nothing
    hangs.unlink()

    assert job(day) == ours
    assert not any(isinstance(x.event, e.StrayFound) for x in site.entries())
    day.ends(submitted=1)


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
    day.accounts(None)  # with a test's patience, new nodes may be asked for while the second job still completes


def test_time_limits(site: Site, tmp_path: Path):
    """Two lineages of one node beside each other: one moves in time, the other has no daemon when its limit comes."""
    minute = CONFIG.replace("time_minutes = 30", "time_minutes = 1")
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text().replace(CONFIG, minute))
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other", minute)
    try:
        day = Day(site, nodes=1, spares=0)
        other.start("steps=10000", nodes=1, spares=0)
        other.start_daemon()
        other.wait(lambda state: state.status is Status.TRAINING)
        other.kill_daemon()

        moved = day.sees("time_limit")
        assert "1 other nodes are held" in moved.cause
        assert moved.step_resumed >= day.saved_before_it_left(moved.attempt)
        assert not any(node.excluded_by for node in day.state.nodes.values())
        day.ends(submitted=2)

        cut = other.state().allocation.job
        until(lambda: ask("sacct", "-n", "-X", "-j", cut, "-o", "State").split() == ["TIMEOUT"])
        other.start_daemon()
        closed = other.wait(lambda s: len(s.incidents) == 2 and all(i.closed_at for i in s.incidents.values()) and s)
        assert [i.kind for i in closed.incidents.values()] == ["daemon_restart", "time_limit"]
        assert all(incident.proven for incident in closed.incidents.values())
        assert "TIMEOUT" in closed.incidents["1-i001"].cause
    finally:
        other.close()


def test_somebody_more_important_takes_the_nodes(site: Site):
    day = Day(site)
    urgent = ask("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 8")
    taken = day.sees("preemption")
    assert "PREEMPTED" in taken.cause
    assert taken.step_resumed == day.sound_before(taken.next_attempt)
    until(lambda: ask("sacct", "-n", "-X", "-j", urgent, "-o", "State").split() == ["COMPLETED"])
    day.ends()


def test_preemption_with_a_grace_time_is_told_apart(site: Site):
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text().replace('"main"', '"graceful"'))
    day = Day(site)
    ask("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 5")
    graceful = day.sees("preemption")
    state = day.state
    again = state.attempts[graceful.next_attempt].intended_at
    saved = max(known.checkpoint.step for known in state.checkpoints.values() if known.good and known.seen_at < again)
    assert graceful.step_resumed == saved, "the last one, saved within the grace"
    day.ends()


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
    assert all(f"1-i00{number} process_death: restart" in page["body"] for number in range(3))
    assert "Next: opt-ops run explain 1" in page["body"]


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
