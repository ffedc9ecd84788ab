"""The time to recover from each failure class, on the real Slurm of tests/slurm/cluster.py.

    python -m benchmarks.recovery --samples 3 --append

Shipped playbooks and ticks. The real trainer (opt-tiny) where its start takes most of the time, the stub trainer of the
tests for the rest. The figures are those of report.json's incidents, which come from the journal. `own share` is the
time from the incident to the new orders, without the end of the old ranks. Medians over the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from opt_ops.core import events as e
from tests.e2e.site import STUB, Site
from tests.slurm import cluster
from tests.slurm.day import CONFIG, ask, until

RESULTS = Path(__file__).with_name("RESULTS.md")
REAL = f"'{sys.executable}', '-m', 'trainer'"
_QUIET_STEPS = 720  # between two failures of a kind, so that each meets the first rung of its ladder
FAKE = f"'{sys.executable}', '{STUB}'"


@dataclass
class Row:
    """One failure class."""

    name: str
    goal: str
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def text(self) -> str:
        """Return a line of the table."""
        names = ("see", "decide", "relaunch", "first_step")
        cells = [_median([sample[f"seconds_to_{name}"] for sample in self.samples]) for name in names]
        cells += [_median([sample[name] for sample in self.samples]) for name in ("own", "seconds_down")]
        cells.append(_median([sample["steps_lost"] for sample in self.samples], "{:.0f}"))
        return f"| {self.name} | {len(self.samples)} | {' | '.join(cells)} | {self.goal} |"


def _median(values: list[float | None], form: str = "{:.1f}") -> str:
    known = [value for value in values if value is not None]
    return form.format(median(known)) if known else ""


class Lineage:
    """One lineage in training, with failures to inject and measure."""

    def __init__(self, site: Site, slurm: cluster.Cluster, recipe: str, *settings: str) -> None:
        self.site, self.slurm = site, slurm
        options = [f"--set={setting}" for setting in settings]
        site.command("run", "start", recipe, *options, "--nodes=2", "--spares=1", "-q")
        site.start_daemon()
        self.trained(30, 180)

    def trained(self, steps: int, seconds: float = 120) -> None:
        """Wait for more steps of the newest attempt."""
        self.site.wait(lambda state: state.status == "TRAINING", seconds)
        began = self.site.step()
        until(lambda: self.site.step() >= began + steps, seconds)

    def sample(self, inject: Callable[[Lineage], None], seconds: float = 180) -> dict[str, Any]:
        """Inject one failure. Returns its incident, from the evidence to the proof."""
        before = len(self.site.state().incidents)
        inject(self)
        self.site.wait(lambda s: len(s.incidents) > before and all(i.closed_at for i in s.incidents.values()), seconds)
        self.site.command("logbook", "render", "1", "-q")
        report = json.loads((self.site.runs / "1/chronicle/report.json").read_text())
        incident = report["incidents"][before]
        assert incident["proven"], incident["proof"]
        return {**incident, "own": self._own_share(incident)}

    def _own_share(self, incident: dict[str, Any]) -> float:
        """Return the seconds from the incident to the orders, without the end of the old ranks."""
        spent = incident["seconds_to_decide"] + incident["seconds_to_relaunch"]
        entries = [x for x in self.site.entries() if getattr(x.event, "attempt", None) == incident["attempt"]]
        stopped = [x.ts for x in entries if isinstance(x.event, e.StopIntended)]
        ended = [x.ts for x in entries if isinstance(x.event, e.AttemptEnded)]
        return spent - (ended[0] - stopped[0] if stopped else 0.0)

    def repair(self) -> None:
        """Allow excluded nodes again."""
        for name, node in self.site.state().nodes.items():
            if node.excluded_by:
                ask("scontrol", "update", f"nodename={name}", "state=resume")
                self.site.command("node", "allow", "1", name, "--yes", "-q")


@contextmanager
def lineage(slurm: cluster.Cluster, trainer: str, *settings: str) -> Iterator[Lineage]:
    """Start a lineage of its own, and leave four idle nodes afterwards."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        site = Site(Path(folder), CONFIG, trainer=trainer, quick=False)
        try:
            yield Lineage(site, slurm, "opt-tiny" if trainer == REAL else "stub", *settings)
        finally:
            site.close()
            ask("scancel", "--me")
            for node in slurm.nodes:
                slurm.revive_node(node)
            until(lambda: not ask("squeue", "-h"))
            for node, state in slurm.states().items():
                if state != "idle":
                    ask("scontrol", "update", f"nodename={node}", "state=resume")
            until(lambda: set(slurm.states().values()) == {"idle"})


def drill(*words: str) -> Callable[[Lineage], None]:
    """Return a function that injects a fault with the command `drill`."""
    return lambda of: print(of.site.command("drill", *words, "--yes", "-q"), end="")


def bad_gpu(of: Lineage) -> None:
    """Inject Xid 79 on the second node of the attempt."""
    attempt = of.site.state().attempt
    assert attempt is not None
    drill("xid", "1", "--node", attempt.nodes[1], "--xid", "79")(of)


def kill_job(of: Lineage) -> None:
    """Send SIGKILL to everything of the job: ranks, agents, steps and the batch script."""
    ask("scancel", "--signal=KILL", "--full", str(of.site.state().live_allocations[0].job))


def silence(of: Lineage) -> None:
    """Kill everything on the second node: agent, ranks, slurmstepd and slurmd."""
    attempt = of.site.state().attempt
    assert attempt is not None
    of.slurm.kill_node(attempt.nodes[1])


def fault(what: str) -> Callable[[Lineage], None]:
    """Return a function that injects a fault of the stub trainer."""
    return lambda of: of.site.fault(what)


def measure_real(slurm: cluster.Cluster, samples: int) -> list[Row]:
    """Measure with the real trainer. The first two rows: a rank dies, and all ranks die with their job."""
    rows: list[Row] = []
    with lineage(slurm, REAL, "steps=20000", "checkpoint_every=50") as of:
        for name, goal, inject in (
            ("rank killed: relaunch inside the allocation", "see ≤ 10 s", drill("kill-rank", "1", "--rank", "1")),
            ("GPU bad (Xid 79)", "see ≤ 10 s", bad_gpu),
            ("hang (a stopped process)", "see ≤ 30 s", drill("hang", "1", "--rank", "1")),
        ):
            rows.append(row := Row(name, goal))
            for _ in range(samples):
                of.trained(60)
                row.samples.append(of.sample(inject))
                of.repair()
            print(row.text(), file=sys.stderr)
    rows.insert(1, row := Row("all ranks killed with their job: resubmission", ""))
    for _ in range(samples):
        with lineage(slurm, REAL, "steps=20000", "checkpoint_every=50") as of:
            of.trained(60)
            row.samples.append(of.sample(kill_job))
    print(row.text(), file=sys.stderr)
    return rows


def measure_stub(slurm: cluster.Cluster, samples: int) -> list[Row]:
    """Measure with the stub trainer."""
    rows: list[Row] = []
    with lineage(slurm, FAKE, "steps=20000", "pause=0.01") as of:
        for name, goal, what in (
            ("rank killed", "see ≤ 10 s", "die"),
            ("loss not finite", "", "nan"),
            ("loss spike that does not heal (50 steps)", "", "spike"),
        ):
            rows.append(row := Row(name, goal))
            for _ in range(samples):
                of.trained(_QUIET_STEPS)
                row.samples.append(of.sample(fault(what)))
            print(row.text(), file=sys.stderr)
    rows.append(row := Row("node silent", "see ≤ 30 s"))
    for _ in range(samples):
        with lineage(slurm, FAKE, "steps=20000") as of:
            row.samples.append(of.sample(silence))
    print(row.text(), file=sys.stderr)
    return rows


_ABOUT = """## Recovery, by failure class

{date}; {cores} CPU cores, no GPU, {slurm} with four nodes on one host; opt-ops {ops}, torch {torch}, Python {python};
the machine was shared with other work. Shipped playbooks, ticks of 1 s, medians. {seconds:.0f} s.

```
{command}
```

*see*: first evidence → incident; *decide*: → decision; *relaunch*: → ranks ordered; *first step*: → end of the first
update; *own share*: decide + relaunch less the end of the old ranks (goal ≤ 5 s); *down*: from the last update before
to the first one after. Seconds.

Real trainer (opt-tiny, two ranks on two nodes):

{real}

Down {inside:.1f} s inside the allocation and {queue:.1f} s through the queue: {down:.1f} × (goal ≥ 5 ×).
Without the trainer's own start, which both need, {inside_own:.1f} s and {queue_own:.1f} s: {own:.1f} ×.
The cluster was idle.
Resubmission holds sbatch, Slurm's scheduling, the start of the agents, polls every 5 s and the pause between two tries.
It holds no waiting behind other people's jobs, which is what resubmission costs on a cluster in use.

Stub trainer (starts in 0.1 s, so that little but the supervisor's own time is left):

{stub}
"""

_HEAD = """\
| failure | samples | see | decide | relaunch | first step | own share | down | steps lost | goal |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def report(real: list[Row], stub: list[Row], began: float) -> str:
    """Return the text for RESULTS.md."""
    down = [median(s["seconds_down"] for s in row.samples) for row in real[:2]]
    own = [median(s["seconds_down"] - s["seconds_to_first_step"] for s in row.samples) for row in real[:2]]
    return _ABOUT.format(
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        cores=os.cpu_count(),
        slurm=ask("sinfo", "--version"),
        ops=version("opt-ops"),
        torch=version("torch"),
        python=platform.python_version(),
        seconds=time.time() - began,
        command=shlex.join(["python", "-m", "benchmarks.recovery", *sys.argv[1:]]),
        real=_HEAD + "\n".join(row.text() for row in real),
        stub=_HEAD + "\n".join(row.text() for row in stub),
        inside=down[0],
        queue=down[1],
        down=down[1] / down[0],
        inside_own=own[0],
        queue_own=own[1],
        own=own[1] / own[0],
    )


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--append", action="store_true", help="to benchmarks/RESULTS.md")
    options = parser.parse_args()
    began = time.time()
    slurm = cluster.up()
    os.environ.update(slurm.env)
    try:
        text = report(measure_real(slurm, options.samples), measure_stub(slurm, options.samples), began)
    finally:
        if not slurm.was_up:
            cluster.down(slurm.folder)
    print(text)
    if options.append:
        with RESULTS.open("a") as file:
            file.write("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
