"""Nothing of a test run outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.e2e.site import until

ROOT = Path(__file__).parents[1]


def test_what_a_killed_run_has_left_is_ended_and_nothing_else():
    gone = subprocess.Popen(["true"])
    gone.wait()
    sleep = ["sleep", "600"]
    orphan = subprocess.Popen(sleep, env={**os.environ, processes.MARK: f"{gone.pid}.1"})
    ours, foreign = subprocess.Popen(sleep), subprocess.Popen(sleep, env={"PATH": os.environ["PATH"]})
    try:
        processes.end_orphans()
        assert orphan.wait(240) == -signal.SIGKILL
        assert (ours.poll(), foreign.poll()) == (None, None)
        assert ours.pid in processes.of(os.environ[processes.MARK])
    finally:
        for process in (orphan, ours, foreign):
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, number: signal.Signals):
    """A daemon, its agents and their ranks, started by a worker of pytest-xdist."""
    test = "tests/e2e/test_scenarios.py::test_a_node_falls_silent_with_everything_on_it"
    options = ["-q", "-n1", "-pno:cacheprovider", f"--basetemp={tmp_path}/run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, test],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    its = processes.name(run.pid)
    try:
        until(lambda: list(tmp_path.glob("run/popen-gw0/*/runs/1/1.00/a0/telemetry.jsonl")))
        assert len(processes.of(its)) > 5
        os.kill(run.pid, number) if number == signal.SIGTERM else os.killpg(run.pid, number)
        assert run.wait(240) == pytest.ExitCode.INTERRUPTED, (tmp_path / "said").read_text()
        assert processes.of(its) == []
    finally:
        run.kill()
