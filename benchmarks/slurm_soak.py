"""`kill -9` of the real daemon during a day of failures, on the real Slurm of tests/slurm/cluster.py.

    python -m benchmarks.slurm_soak --kills 25 --seed 1

`soak(kills, seed, folder)` trains lineages with the stub trainer of the tests, one after the other. Between two kills
it injects a failure and adds a note, sometimes while no daemon runs. Every lineage must end COMPLETED, with one job for
each allocation of the journal, and every request answered once. The command exits with 1 if that is not so.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from opt_ops.core import events as e
from tests.e2e.site import Site
from tests.slurm import cluster
from tests.slurm.day import CONFIG, ask, until

KILLS_A_LINEAGE = 5
_FAULTS = ("die", "exit-7", "nccl", "full", "oom", "nan", "")
_QUIET_STEPS = 55  # between two failures, so that each counts as a first failure


@dataclass
class Figures:
    """The figures of a soak."""

    kills: int = 0
    lineages: int = 0
    faults: int = 0
    incidents: int = 0
    submissions: int = 0
    duplicates: int = 0  # jobs in Slurm's accounts beyond one for each allocation of the journal
    requests: int = 0
    answered: int = 0
    lost_requests: int = 0  # still in the inbox, or answered twice
    unproven: int = 0
    completed: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing was duplicated, lost or left undone."""
        wrong = self.duplicates or self.lost_requests or self.unproven or self.requests != self.answered
        return self.completed == self.lineages and not wrong


def soak(kills: int, seed: int, folder: Path) -> Figures:
    """Kill the daemon `kills` times at random moments. Needs SLURM_CONF of a cluster with four idle nodes."""
    figures, chance, began = Figures(), random.Random(seed), time.monotonic()
    while figures.kills < kills:
        _lineage(folder / f"{figures.lineages}", min(KILLS_A_LINEAGE, kills - figures.kills), chance, figures)
        figures.lineages += 1
        print(f"{figures.kills} of {kills} kills, {figures.faults} faults", file=sys.stderr)
    figures.seconds = time.monotonic() - began
    return figures


def _lineage(folder: Path, kills: int, chance: random.Random, figures: Figures) -> None:
    folder.mkdir()
    site = Site(folder, CONFIG)
    try:
        site.start("steps=100000")
        site.start_daemon()
        site.wait(lambda state: state.status == "TRAINING")
        # Each fault once: if a fault recurs soon, the shipped ladders end in a halt, as they should.
        for number, fault in enumerate(chance.sample(_FAULTS, kills)):
            _one_kill(site, chance, number, fault, figures)
        _trained(site, 1)
        site.end_after(250)
        figures.requests += 1
        site.ended(seconds=120)
        _count(site, figures)
    finally:
        site.close()
        ask("scancel", "--me")
        until(lambda: not ask("squeue", "-h"))


def _trained(site: Site, steps: int) -> int:
    site.wait(lambda state: state.status == "TRAINING", 120)
    began = site.step()
    return int(until(lambda: (step := site.step()) >= began + steps and step, 120))


def _one_kill(site: Site, chance: random.Random, number: int, fault: str, figures: Figures) -> None:
    _trained(site, _QUIET_STEPS)
    early = chance.random() < 0.5
    if fault and early:
        site.fault(fault)
    time.sleep(chance.uniform(0.0, 3.0))
    site.kill_daemon()
    figures.kills += 1
    if fault and not early:
        site.fault(fault)
    figures.faults += bool(fault)
    time.sleep(chance.uniform(0.0, 2.0))
    site.start_daemon()
    site.command("run", "note", "1", f"killed {number}", "-q")
    figures.requests += 1
    site.wait(lambda state: all(incident.closed_at is not None for incident in state.incidents.values()), 120)


def _count(site: Site, figures: Figures) -> None:
    state, events = site.state(), [entry.event for entry in site.entries()]
    jobs = {event.job for event in events if isinstance(event, e.AllocationSubmitted)}
    refused = {f"opt-ops-{event.allocation}" for event in events if isinstance(event, e.AllocationFailed)}
    accounts = [line.split("|") for line in ask("sacct", "-n", "-P", "-X", "-o", "JobID,JobName,Comment").splitlines()]
    mine = [job for job, name, comment in accounts if str(site.runs) in comment and name not in refused]
    answers = Counter(name for event in events if (name := getattr(event, "request", None)) is not None)
    figures.incidents += len(state.incidents)
    figures.submissions += len(mine)
    figures.duplicates += len(set(mine) - jobs) + len(mine) - len(set(mine))
    answered = sum(isinstance(event, e.NoteAdded | e.ChangeRequested) for event in events)
    doubly = sum(number - 1 for number in answers.values())
    figures.lost_requests += len(list((site.runs / "1/inbox").glob("*.json"))) + doubly
    figures.answered += answered
    figures.unproven += sum(incident.proven is not True for incident in state.incidents.values())
    figures.completed += state.status == "COMPLETED"


def main() -> int:
    """Run the command, on the cluster that is up, or on one that is started for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    slurm = cluster.up()
    os.environ.update(slurm.env)
    try:
        with tempfile.TemporaryDirectory(prefix="slurm-soak-") as folder:
            figures = soak(options.kills, options.seed, Path(folder))
    finally:
        if not slurm.was_up:
            cluster.down(slurm.folder)
    print("| | |\n| --- | ---: |")
    for name, value in asdict(figures).items():
        print(f"| {name.replace('_', ' ')} | {round(value) if isinstance(value, float) else value} |")
    return 0 if figures.clean else 1


if __name__ == "__main__":
    sys.exit(main())
