"""What commands cost by the length of a journal, in CPU seconds and relative to `opt-ops --version`.

    python -m benchmarks.journal_size [--times 5] [--events 100 10000 100000]

Each journal is that of a lineage that trains, saves, alerts, is judged and gets notes; a daemon's snapshot lies beside
it, up to 999 events old, as it does in life. `--no-snapshot` deletes it: every command then reads the whole journal.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from opt_ops.core import events as e
from opt_ops.core.state.fold import fold
from opt_ops.core.values import AllocationStatus, Checkpoint, Outcome, Severity, Verdict
from opt_ops.runfolder import snapshot
from tests.chronicles.told import Told

_ROWS = (
    ("opt-ops --version", ["--version"]),
    ("opt-ops q", ["q"]),
    ("opt-ops run rollback --dry-run", ["run", "rollback", "12", "--to", "40", "--dry-run"]),
    ("opt-ops run rollback --no-wait", ["run", "rollback", "12", "--to", "40", "--yes", "--no-wait"]),
    ("opt-ops run show", ["run", "show", "12"]),
)


def main() -> None:
    """Write a journal of each length, and run every command some times on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--events", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--no-snapshot", action="store_true", help="delete the snapshot first")
    arguments = parser.parse_args()
    print(f"{'events':>8}  {'command':32} {'CPU s':>8} {'x --version':>12}")
    for events in arguments.events:
        with tempfile.TemporaryDirectory() as scratch:
            lineage = Path(scratch) / "runs" / "12"
            write_journal(lineage, events)
            if arguments.no_snapshot:
                snapshot.path_of(lineage / "journal").unlink(missing_ok=True)
            used = {name: [_cpu_seconds(command, scratch) for _ in range(arguments.times)] for name, command in _ROWS}
            least = median(used["opt-ops --version"])
            for name, seconds in used.items():
                print(f"{events:>8,}  {name:32} {median(seconds):8.3f} {median(seconds) / least:12.2f}")


def _cpu_seconds(command: list[str], folder: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "opt_ops", *command]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_journal(folder: Path, events: int, ended: bool = False) -> None:
    """Write the journal of a lineage that trains, of about so many lines. `ended`: it has completed."""
    told = Told(folder, steps=200)
    run = f"{told.lineage}.00"
    told.begin().plan(run).hold().launch(f"{run}-a0").train(f"{run}-a0", 1, 120)
    told.save(run, 40)
    sync, os.fdatasync = os.fdatasync, lambda _: None
    last = 0
    for event in _life(told):
        if told.state.seq >= events:
            break
        entry = told.journal.stamp(event, told.now + told.state.seq)
        told.state = fold(told.state, entry)
        told.journal.append(entry)
        if told.state.seq - last >= snapshot.EVERY_EVENTS:
            last = told.state.seq
            told.journal.save_snapshot(told.state)
    if ended:
        told.end(f"{run}-a0", Outcome.COMPLETED, 120).see(e.LineageCompleted(step=120))
        (held,) = told.state.live_allocations
        told.see(e.AllocationChanged(allocation=held.name, status=AllocationStatus.ENDED, nodes=(), reason=""))
    os.fdatasync = sync
    told.journal.close()


def _life(told: Told) -> Iterator[e.Event]:
    """What a journal of weeks is made of: mostly progress, and one of each other kind for ten of that."""
    number = 0
    while True:
        attempt = told.state.attempt
        assert attempt is not None
        for _ in range(10):
            number += 1
            yield e.AttemptProgressed(attempt=attempt.name, first_step=1, first_step_at=0.0, step=120, at=told.now)
        checkpoint = Checkpoint(run=attempt.run, step=40, path=f"/scratch/runs/12/{attempt.run}/step-{number:08d}")
        yield e.CheckpointSeen(checkpoint=checkpoint)
        yield e.CheckpointVerified(checkpoint=checkpoint, healthy=True, why="")
        yield e.AlertIntended(
            alert=f"12-{number}", severity=Severity.INFO, title="a title", body="a body of a few words"
        )
        yield e.AlertSettled(alert=f"12-{number}", delivered=True, why="")
        yield e.NodeJudged(node="n1", host="n1", verdict=Verdict.HEALTHY, reason="ok", source="agent", at=told.now)
        yield e.NoteAdded(request=f"{number:032x}", author="ann", target="12", text="a note of some words, by a person")
        if number % 100 == 0:  # the trainer keeps some
            gone = tuple(path for path in list(told.state.checkpoints)[:-20])
            yield e.CheckpointsGone(run=attempt.run, paths=gone)


if __name__ == "__main__":
    main()
