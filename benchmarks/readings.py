"""What watching a node costs: the reading process on it, and the daemon for its heartbeats.

    python benchmarks/readings.py --seconds 60

The real reading process with the real pynvml runs over the fake driver of tests/fake_nvml with 8 GPUs, once a second
(agents read every two). Its CPU time is that of the kernel's books, after the first reading; the fake driver looks into
a file at every call, and that is part of it. The daemon's part is `heartbeat_of`, `remember` and `judge` for one
heartbeat of 8 GPUs whose temperatures have changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from opt_ops.core.health import History, judge, remember
from opt_ops.runfolder.heartbeat import heartbeat_of
from tests.fake_nvml.build import FakeDriver

GPUS = 8
BEATS = 500


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reading_process(folder: Path, seconds: float) -> tuple[float, float, dict[str, Any]]:
    """Percent of a core, milliseconds of CPU a reading, and the last reading."""
    driver = FakeDriver(folder, gpus=GPUS)
    command = [sys.executable, "-m", "opt_ops.node", "readings", "--every", "1"]
    env = {**os.environ, **driver.env}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        started, before, readings = time.monotonic(), cpu_seconds(process.pid), 0
        while time.monotonic() - started < seconds:
            line = process.stdout.readline()
            readings += 1
        spent, wall = cpu_seconds(process.pid) - before, time.monotonic() - started
        process.kill()
    return 100 * spent / wall, 1000 * spent / readings, json.loads(line)


def daemon(reading: dict[str, Any]) -> float:
    """Microseconds of CPU for one heartbeat."""
    history = History()
    where = {"node": "n1", "host": "h", "attempt": "a", "allocation": "1-n0"}
    began = time.process_time()
    for beat in range(BEATS):
        for gpu in reading["gpus"]:
            gpu["temperature"] = 50 + beat % 30
        heartbeat = heartbeat_of({**where, "ts": 2.0 * beat, **reading})
        history = remember(history, heartbeat, GPUS)
        judge(heartbeat, GPUS, history)
    return 1e6 * (time.process_time() - began) / BEATS


def main() -> None:
    """Print the figures as a Markdown table."""
    parser = argparse.ArgumentParser(description="What watching a node costs.")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        percent, milliseconds, reading = reading_process(Path(folder), options.seconds)
    microseconds = daemon(reading)
    print("| | |\n| --- | ---: |")
    print(f"| GPUs | {len(reading['gpus'])} |")
    print(f"| bytes of a reading | {len(json.dumps(reading))} |")
    print(f"| CPU of the reading process at 1 Hz, percent of a core | {percent:.2f} |")
    print(f"| CPU of a reading, ms | {milliseconds:.1f} |")
    print(f"| CPU of the daemon for a heartbeat, µs | {microseconds:.0f} |")
    print(f"| … for 2,048 nodes every 2 s, percent of a core | {microseconds * 2048 / 2 / 1e4:.0f} |")


if __name__ == "__main__":
    main()
