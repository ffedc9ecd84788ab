"""This machine as a cluster: agents outlive the daemon that started them, and the next one finds them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opt_ops.adapters.local import LocalScheduler
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import Refused, SchedulerUnavailable


def until(scheduler: LocalScheduler, job: str, status: AllocationStatus) -> None:
    deadline = time.monotonic() + 120
    while scheduler.state(job).status is not status:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_agents_outlive_the_process_that_started_them_and_are_found_by_the_next(tmp_path: Path):
    code = (
        "import sys, os, pathlib; from opt_ops.adapters.local import LocalScheduler;"
        f"print(LocalScheduler(pathlib.Path({str(tmp_path)!r}), ['n1', 'n2', 'n3']).submit('1-n0', 2, ['n1']));"
        "sys.stdout.flush(); os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1-n0\n"
    scheduler = LocalScheduler(tmp_path, ["n1", "n2", "n3"])
    assert scheduler.jobs() == [("1-n0", "1-n0")]
    state = scheduler.state("1-n0")
    assert (state.status, state.nodes) == (AllocationStatus.RUNNING, ("n2", "n3"))
    scheduler.cancel("1-n0")
    until(scheduler, "1-n0", AllocationStatus.ENDED)
    scheduler.cancel("1-n0")


def test_more_than_there_is_is_refused_with_the_numbers(tmp_path: Path):
    scheduler = LocalScheduler(tmp_path, ["n1", "n2"])
    with pytest.raises(Refused, match=r"2 wanted, 1 left \(n2\); excluded or in use: n1"):
        scheduler.submit("1-n0", 2, ["n1"])
    assert scheduler.jobs() == []


def test_a_number_that_is_another_process_by_now_is_not_our_agent(tmp_path: Path):
    scheduler = LocalScheduler(tmp_path, ["n1"])
    scheduler.submit("1-n0", 1, [])
    path = tmp_path / "agents" / "1-n0.json"
    (agent,) = json.loads(path.read_text())
    scheduler.cancel("1-n0")
    until(scheduler, "1-n0", AllocationStatus.ENDED)
    # The process id is now that of this test. It must neither count as alive nor be killed.
    path.write_text(json.dumps([{**agent, "pid": os.getpid()}]))
    assert scheduler.state("1-n0").status is AllocationStatus.ENDED
    scheduler.cancel("1-n0")


def test_a_local_node_cannot_be_drained(tmp_path: Path):
    with pytest.raises(Refused, match="n1 is a local node"):
        LocalScheduler(tmp_path, ["n1"]).drain("n1", "x")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[1]", '[{"node": "n1"}]', '[{"node": "n1", "pid": 1, "started": 5}]', "\x00", '"x"']
)
def test_a_damaged_list_of_agents_is_no_answer(tmp_path: Path, text: str):
    scheduler = LocalScheduler(tmp_path, ["n1", "n2"])
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "1-n0.json").write_text(text)
    for question in (lambda: scheduler.state("1-n0"), lambda: scheduler.cancel("1-n0"), scheduler.jobs):
        with pytest.raises(SchedulerUnavailable, match="1-n0"):
            question()


def test_a_fork_that_fails_is_no_answer_and_leaves_no_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scheduler, real = LocalScheduler(tmp_path, ["n1", "n2"]), subprocess.Popen
    started: list[subprocess.Popen] = []

    def popen(*arguments: object, **options: object) -> subprocess.Popen:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(SchedulerUnavailable, match="could not be started"):
        scheduler.submit("1-n0", 2, ())
    assert started[0].wait(120) is not None
    assert scheduler.jobs() == []
