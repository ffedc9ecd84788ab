"""Measure how long it takes to mirror a long lineage into a fresh MLflow server on this machine.

    python -m benchmarks.mlflow_sync [--steps 150000] [--keep FOLDER]

The lineage has 150,000 telemetry lines of ten series each. The server is that of `opt-ops mlflow open`, over a fresh
SQLite store. As docs/formats.md says, every 10th step is sent, and every step around incidents.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from chronicles.mlflow_mirror import content
from chronicles.mlflow_mirror.store import serve_command
from chronicles.mlflow_mirror.sync import sync
from opt_ops.core import events as e
from opt_ops.core.values import Action, Outcome
from tests.chronicles.told import Told, falling


def tell(folder: Path, steps: int) -> None:
    """Write a lineage with a rollback in its middle. Its telemetry has all series that the mirror sends."""
    told = Told(folder, steps=steps, step_seconds=4.0)
    half = steps // 2
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, half)
    point = told.save("12.00", half - 100)
    incident = told.incident("loss_spike", f"loss 9.1 at step {half}", "12.00-a0", half, onset_step=half - 40)
    told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=0.75)
    told.end("12.00-a0", Outcome.STOPPED, half)
    told.plan("12.01", "12.00", point, [(half - 100, 0.75)], incident, cause="loss spike")
    told.launch("12.01-a0", point, incident).train("12.01-a0", half - 99, steps, loss=falling).close(incident)
    told.end("12.01-a0", Outcome.COMPLETED, steps).see(e.LineageCompleted(step=steps))
    more = {"actv_norm": 31.5, "loss_scale": 1.0, "tflops": 147.0, "mfu": 0.47, "cuda_gb_allocated": 61.2}
    for path in folder.glob("*/*/telemetry.jsonl"):
        lines = [json.dumps({**json.loads(line), **more}) + "\n" for line in path.read_text().splitlines()]
        path.write_text("".join(lines))


def serve(runs: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """Start a fresh server; return its process, its address, and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, environment = serve_command(f"sqlite:///{runs}/mlflow.db", runs, port)
    began = time.monotonic()
    with (runs / "server.log").open("w") as log:
        env = {**os.environ, **environment}
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return server, url, time.monotonic() - began
        except OSError:
            if server.poll() is not None or time.monotonic() - began > 300:
                raise
            time.sleep(0.2)


def main() -> None:
    """Write the lineage, start the server, sync twice, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    import mlflow

    with tempfile.TemporaryDirectory() as scratch:
        runs = (arguments.keep or Path(scratch)) / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        tell(runs / "12", arguments.steps)
        server, url, start = serve(runs)
        try:
            print(f"{arguments.steps} steps × {len(content.SERIES)} series; MLflow {mlflow.__version__}, ", end="")
            print(f"Python {platform.python_version()}; the server answered after {start:.0f} s")
            for name in ("first", "again"):
                began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
                said = sync(runs / "12", url, "opt-ops")
                after = resource.getrusage(resource.RUSAGE_SELF)
                spent = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
                print(f"{name}: {time.monotonic() - began:.1f} s ({spent:.1f} s of the client's processor): {said}")
            print(f"the store has {(runs / 'mlflow.db').stat().st_size / 1e6:.0f} MB")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
