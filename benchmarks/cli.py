"""How long a command takes from the shell until it has answered, and what of it is Python itself.

    python -m benchmarks.cli [--times 15]

A site with one lineage is made; every command runs in a process of its own. The bare interpreter and an import of typer
stand beside them: nobody can be quicker than these.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.chronicles.told import Told, spiked

_ROWS = (
    ("python -c pass", ["-c", "pass"]),
    ("python -c 'import typer'", ["-c", "import typer"]),
    ("opt-ops --version", ["-m", "opt_ops", "--version"]),
    ("opt-ops q", ["-m", "opt_ops", "q"]),
    ("opt-ops run show 12", ["-m", "opt_ops", "run", "show", "12"]),
    ("opt-ops events 12", ["-m", "opt_ops", "events", "12"]),
    ("opt-ops ledger 12", ["-m", "opt_ops", "ledger", "12"]),
)


def main() -> None:
    """Run every row some times, in turn, so that a busy moment of the machine hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        spiked(Told(Path(scratch) / "runs" / "12", steps=200))
        env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        wall: dict[str, list[float]] = {name: [] for name, _ in _ROWS}
        used: dict[str, list[float]] = {name: [] for name, _ in _ROWS}
        for _ in range(arguments.times):
            for name, command in _ROWS:
                began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *command], cwd=scratch, env=env, check=True, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                wall[name].append(time.monotonic() - began)
                used[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"Python {platform.python_version()}, {arguments.times} times each; seconds")
    print(f"{'':28} {'median':>8} {'fastest':>8} {'processor':>10}")
    for name, _ in _ROWS:
        print(f"{name:28} {median(wall[name]):8.3f} {min(wall[name]):8.3f} {median(used[name]):10.3f}")


if __name__ == "__main__":
    main()
