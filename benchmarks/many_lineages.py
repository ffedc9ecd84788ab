"""What a daemon costs that starts over a runs folder with many lineages, and what a round of its loop costs then.

    python -m benchmarks.many_lineages [--ended 290] [--live 10] [--copied] [--upgraded] [--profile]

Each lineage has a journal of 300, 1,000 or 3,000 lines, of what a lineage of weeks journals. The live ones have lost
their daemon while they trained; the others have ended before. The real daemon's loop runs in this process, nearly
without pauses; the scheduler says that every job runs, and nothing is drawn. `--upgraded`: no snapshot is trusted, as
after an upgrade. `--copied`: files have new times and there is no `daemon.json`, so nothing tells which lineages live.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import os
import pstats
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.journal_size import write_journal
from opt_ops.config import Chronicle, Config, Mlflow
from opt_ops.core.values import AllocationStatus
from opt_ops.ports import JobState
from opt_ops.runfolder import lineages, snapshot
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.journal_reader import scan
from opt_ops.supervise import daemon as loop
from opt_ops.supervise.daemon import Daemon
from tests.supervise.test_daemon_loop import NoNodes

_EVENTS = (300, 1000, 3000)
_QUIET_ROUNDS = 20


class _Runs(NoNodes):
    """A scheduler of which every job runs on the nodes that it had."""

    def state(self, *_: Any) -> JobState:
        return JobState(AllocationStatus.RUNNING, ("n1", "n2", "n3"), "")


def main() -> None:
    """Make the runs folder, and let a daemon start over it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ended", type=int, default=290)
    parser.add_argument("--live", type=int, default=10)
    parser.add_argument("--copied", action="store_true")
    parser.add_argument("--upgraded", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the start spends its time")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        live = _make(runs, arguments.ended, arguments.live)
        if arguments.upgraded:
            for path in lineages.folders(runs):
                snapshot.path_of(path / "journal").unlink(missing_ok=True)
        if arguments.copied:
            _forget_times(runs)
        _measure(runs, live, arguments.profile)


def _make(runs: Path, ended: int, live: int) -> list[Path]:
    """Lineages of each length in turn; the live ones lie evenly between the others. Returns those."""
    models = [runs.parent / str(events) / "12" for events in _EVENTS]
    for model, events in zip(models, _EVENTS, strict=True):
        write_journal(model, events, ended=True)
    ends = [(lineages.state(model), scan(model / "journal").end) for model in models]
    every = max(1, (ended + live) // max(1, live))
    living: list[Path] = []
    for number in range(1, ended + live + 1):
        path = runs / str(number)
        if number % every == 0 and len(living) < live:
            write_journal(path, _EVENTS[len(living) % len(_EVENTS)])
            living.append(path)
            continue
        which = number % len(models)
        shutil.copytree(models[which], path)
        snapshot.save(path / "journal", *ends[which])  # as its daemon left it; that of the model names other files
        os.utime(path / "journal.owner.json", (number, number))
    sign = {"ts": time.time() - 60, "host": "elsewhere", "pid": 7, "lineages": [path.name for path in living]}
    write_json(runs / "daemon.json", sign)
    return living


def _forget_times(runs: Path) -> None:
    (runs / "daemon.json").unlink()
    for path in lineages.folders(runs):
        os.utime(path / "journal.owner.json")


class _Measured(Daemon):
    """The real daemon. It notes what each round has cost, and stops some rounds after all lineages were read."""

    def __init__(self, config: Config, live: list[Path]) -> None:
        super().__init__(config)
        self.live = live
        self.began = time.process_time(), time.monotonic()
        self.ticked: dict[str, float] = {}
        """CPU seconds from the start to the first tick of each live lineage."""
        self.rounds: list[float] = []
        self.quiet: list[float] = []
        self.read = 0.0, 0.0
        """CPU and wall seconds until all lineages were read."""

    def _step(self) -> None:
        before = time.process_time()
        super()._step()
        used = time.process_time() - before
        if self.read[0]:
            self.quiet.append(used)
            self._stopping = len(self.quiet) >= _QUIET_ROUNDS
            return
        self.rounds.append(used)
        if self._first_look.left == 0 and len(self.ticked) == len(self.live):
            self.read = time.process_time() - self.began[0], time.monotonic() - self.began[1]

    def _tick(self, path: Path) -> None:
        super()._tick(path)
        if path in self.live:
            self.ticked.setdefault(path.name, time.process_time() - self.began[0])


def _measure(runs: Path, live: list[Path], profile: bool) -> None:
    loop.scheduler_of = lambda *_: _Runs()  # pyright: ignore[reportAttributeAccessIssue]
    loop.projections_of = lambda *_: []  # pyright: ignore[reportAttributeAccessIssue]
    config = Config(runs=runs, tick_seconds=0.01, mlflow=Mlflow(enabled=False), chronicle=Chronicle(every_seconds=600))
    daemon = _Measured(config, live)
    profiler = cProfile.Profile(time.process_time)
    if profile:
        profiler.runcall(daemon.run)
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    else:
        daemon.run()
    first = sorted(daemon.ticked.values())
    print(f"lineages: {len(lineages.folders(runs))}, of them {len(live)} live; load {os.getloadavg()[0]:.1f}")
    print(f"CPU s to the first tick of a live lineage: {first[0]:.2f}; of the last one: {first[-1]:.2f}")
    print(f"until all were read: CPU s {daemon.read[0]:.2f}, wall s {daemon.read[1]:.1f}, rounds {len(daemon.rounds)}")
    print(f"CPU s of the longest round till then: {max(daemon.rounds):.2f}; of a later one: {median(daemon.quiet):.3f}")


if __name__ == "__main__":
    main()
