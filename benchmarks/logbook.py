"""Measure how long a large logbook takes to draw, and its size: 1,000 incidents over 150,000 steps.

    python -m benchmarks.logbook [--incidents 1000] [--steps 150000] [--keep FOLDER]

tests/chronicles/told.py writes the lineage: a real journal, real telemetry files, a restart every 150 steps, and every
fifth restart is a rollback. `opt-ops logbook render` draws it in its own process, start and imports included.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from opt_ops.core import events as e
from opt_ops.core.values import Action, Outcome
from tests.chronicles.told import Told


def tell(folder: Path, incidents: int, steps: int) -> None:
    """Write a lineage of `steps` steps with `incidents` incidents."""
    told = Told(folder, steps=steps, step_seconds=4.0)
    told.begin().plan("12.00").hold().launch("12.00-a0")
    each, reached, run, attempt = steps // incidents, 0, "12.00", "12.00-a0"
    for number in range(incidents):
        told.train(attempt, reached + 1, reached + each)
        point = told.save(run, max(1, reached + each - 20))
        reached += each
        if number % 5:
            evidence = {"xid": 79, "uuid": f"GPU-{number:04d}", "serial": f"16501230{number:05d}"}
            incident = told.incident(
                "bad_gpu", f"n{number % 50}: xid_79", attempt, reached, nodes=(f"n{number % 50}",), evidence=evidence
            )
            told.decide(incident, Action.RESTART, checkpoint=None)
        else:
            incident = told.incident(
                "loss_spike", f"loss 9.1 at step {reached}", attempt, reached, onset_step=reached - 9
            )
            told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=0.99)
        told.end(attempt, Outcome.STOPPED, reached)
        if not number % 5:
            following = f"12.{len(told.state.runs):02d}"
            factors = [(f.step, f.factor) for f in told.state.runs[run].lr_factors][-3:]
            told.plan(following, run, point, [*factors, (point.step, 0.99)], incident, cause=f"loss 9.1 at {reached}")
            run = following
        place = sum(a.run == run for a in told.state.attempts.values())
        attempt = f"{run}-a{place}"
        told.launch(attempt, point, incident)
        told.train(attempt, point.step + 1, point.step + 25)
        told.close(incident)
        reached = point.step + 25
    told.train(attempt, reached + 1, steps)
    told.end(attempt, Outcome.COMPLETED, steps)
    told.see(e.LineageCompleted(step=steps))


def main() -> None:
    """Write the lineage, draw it three times, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incidents", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = (arguments.keep or Path(scratch)) / "runs"
        folder = runs / "12"
        if not folder.exists():
            tell(folder, arguments.incidents, arguments.steps)
        seconds, used = [], []
        for _ in range(3):
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "opt_ops", "logbook", "render", "12", "-q"]
            subprocess.run(
                command, cwd=runs.parent, check=True, env={"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"}
            )
            seconds.append(time.monotonic() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        chronicle = folder / "chronicle"
        megabytes = {path.name: path.stat().st_size / 1e6 for path in sorted(chronicle.iterdir()) if path.is_file()}
        rows = json.loads((chronicle / "report.json").read_text())
        print(f"{len(rows['incidents'])} incidents, {rows['step']} steps, Python {platform.python_version()}")
        print(f"drawn in {', '.join(f'{each:.1f}' for each in seconds)} s of wall clock")
        print(f"of the processor {', '.join(f'{each:.1f}' for each in used)} s, peak {peak:.0f} MB")
        print(", ".join(f"{name} {size:.2f} MB" for name, size in megabytes.items()))


if __name__ == "__main__":
    main()
