"""Ends what a test run leaves behind, in whatever way the run ends: also by SIGKILL, when no exit hook runs.

    python -m tests.watchdog RUN

Its stdin is the read end of a pipe whose only write end is the run's: the kernel closes that when the run is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from tests import processes
from tests.slurm import cluster

ROOT = Path(__file__).parents[1]


def start(run: str) -> IO[bytes]:
    """Start the watchdog of this process. It begins its work when the returned pipe is closed."""
    environment = {name: value for name, value in os.environ.items() if name != processes.MARK}  # it outlives the run
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "tests.watchdog", run],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run
    )
    watchdog.returncode = 0  # nobody waits for it
    assert watchdog.stdin is not None
    return watchdog.stdin


def clean_up(run: str) -> None:
    """End the processes and the clusters of a run."""
    started = [folder for folder in cluster.folders() if _belongs(folder, run)]
    processes.end(run)
    for folder in started:
        if cluster.run_of(folder) is not None or not list(cluster.processes_of(folder)):
            cluster.down(folder)
    processes.end(run)


def _belongs(folder: Path, run: str) -> bool:
    """Whether a worker of the run has its cluster there, or the run itself has brought it up."""
    if (of := cluster.run_of(folder)) is not None:
        return str(of) == run.partition(".")[0]
    marked = set(processes.of(run))
    return any(pid in marked for pid, _, _ in cluster.processes_of(folder))


def main() -> None:
    """Wait for the end of the run, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean_up(sys.argv[1])


if __name__ == "__main__":
    main()
