"""However a test run ends, nothing of its clusters is left soon after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.e2e.site import until
from tests.slurm import cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param([signal.SIGINT], marks=pytest.mark.soak),
        pytest.param([signal.SIGINT, signal.SIGINT], marks=pytest.mark.soak),
        [signal.SIGKILL],
    ],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGKILL"],
)
def test_a_run_that_is_interrupted_leaves_no_cluster(tmp_path: Path, signals: list[signal.Signals]):
    try:
        cluster.require()
    except cluster.UnavailableError as error:
        pytest.skip(str(error))
    test = "tests/slurm/test_cluster.py::test_up_twice_finds_the_same_cluster"
    options = ["-q", "-n2", "--dist=each", "-pno:cacheprovider", f"--basetemp={tmp_path}/run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, test],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    its = processes.name(run.pid)
    folders = [cluster.folder_of(worker, run.pid) for worker in ("gw0", "gw1")]
    try:
        until(lambda: any(len(list(cluster.processes_of(folder))) >= 2 for folder in folders))
        for number in signals:
            os.kill(run.pid, number) if number == signal.SIGKILL else os.killpg(run.pid, number)
        until(lambda: run.poll() is not None)
        until(lambda: not processes.of(its) and not any(folder.exists() for folder in folders))
        assert [each for folder in folders for each in cluster.processes_of(folder)] == []
    finally:
        run.kill()
        run.wait()
