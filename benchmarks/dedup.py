"""Deduplication of 50 MB: rensa and datatrove on this machine, and datatrove on the test Slurm with a task killed.

    python -m benchmarks.dedup --megabytes 50

The text is the Python sources of the installed packages, a document a file, with planted copies: of every 14th document
one with other letters, and of every 13th one in which 0.5 % of the words are others (a Jaccard index of about 0.95).
Each variant is the command of docs/data.md in a process of its own. Seconds are of the wall clock; beside them stands
the machine's load at the end, for this counts only on a machine that does nothing else. The results must be equal, byte
for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.slurm import cluster
from tests.slurm.test_dedup_jobs import kill_task

FILES = 5


def corpus(folder: Path, size: int) -> int:
    """Write about ``size`` bytes of JSON lines; return how many documents they are."""
    chosen, texts, total = random.Random(1), [], 0
    for number, path in enumerate(sorted(Path(np.__file__).parents[1].rglob("*.py"))):
        text = path.read_text(errors="replace")
        if not 2_000 < len(text) < 100_000:
            continue
        before = len(texts)
        texts.append(text)
        if number % 14 == 0:
            texts.append(text.upper())
        if number % 13 == 0:
            texts.append(re.sub(r"\w+", lambda word: "other" if chosen.random() < 0.005 else word[0], text))
        total += sum(map(len, texts[before:]))
        if total > size:
            break
    chosen.shuffle(texts)
    folder.mkdir()
    for number in range(FILES):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::FILES])
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return len(texts)


def command(folder: Path, name: str, *options: str, kill: bool = False) -> float:
    """Run the command; seconds of the wall clock. ``kill``: one task of its first job is killed."""
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "trainer.data.dedup", str(folder / "in"), "--out", str(folder / name), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
        if kill and (found := re.match(r"signatures: job (\d+)", line)):
            kill = False
            while not kill_task(found[1], 1):
                pass
            print("  (killed a task)", file=sys.stderr, flush=True)
    if child.wait():
        raise SystemExit(f"{name}: exit code {child.returncode}")
    return time.monotonic() - began


def kept(folder: Path) -> dict[str, bytes]:
    """The lines that stay and what was removed."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "dedup.json"}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        documents = corpus(folder / "in", given.megabytes * 1_000_000)
        size = sum(path.stat().st_size for path in (folder / "in").iterdir())
        print(
            f"{size / 1e6:.1f} MB, {documents:,} documents; rensa {version('rensa')}, datatrove {version('datatrove')}"
        )
        running = cluster.up()
        os.environ.update(running.env)
        try:
            jobs = ("--engine", "datatrove", "--slurm", "partition=main,time=30")
            for name, options, kill in (
                ("rensa, 2 processes", ("--workers", "2"), False),
                ("datatrove, 2 processes", ("--engine", "datatrove", "--workers", "2"), False),
                ("datatrove, Slurm", jobs, False),
                ("datatrove, Slurm, one task killed", jobs, True),
            ):
                seconds = command(folder, name, *options, kill=kill)
                report = json.loads((folder / name / "dedup.json").read_text())
                same = "yes" if kept(folder / name) == kept(folder / "rensa, 2 processes") else "NO"
                gone = report["removed"]
                load = os.getloadavg()[0]
                print(
                    f"| {name} | {seconds:.0f} | {load:.0f} | {gone['exact']} | {gone['near']} | {same} |", flush=True
                )
        finally:
            if not running.was_up:
                cluster.down(running.folder)


if __name__ == "__main__":
    main()
