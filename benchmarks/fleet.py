"""The cost of one daemon that watches a whole fleet in real time, and its delay from evidence to decision.

    python -m benchmarks.fleet --nodes 16 128 512 2048 --rounds 2
    python -m benchmarks.fleet --nodes 256 --rounds 0 --seconds 260 --speed 16    # memory, over many readings

`opt-ops daemon run` watches a lineage in a run folder on a local disk. Another process, `benchmarks/fleet_feeder.py`,
writes the files of the fleet's agents and trainer at their real rate. The scheduler is the Slurm adapter. Slurm's
commands are shell scripts that answer like a controller that gives us all nodes, because so many agents cannot run on
one machine. The logbook is drawn every 30 seconds, as shipped, by processes that are counted separately. MLflow is off.

Each round injects four faults at random moments, each after training has continued from the one before: an Xid 79, a
loss that is not finite, a silent node, a dead rank. The delay is the time from the line in the run folder to the
decision in the journal, as a reader of both sees it. Two rules wait on purpose, and the table says how long. The
playbooks are the shipped ones, except for budgets and margins that do not allow so many faults in a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.fleet_feeder import GPUS, names
from opt_ops import playbook_loader
from opt_ops.ports import Request
from opt_ops.runfolder.inbox import FileInbox

FAULTS = {"xid": "bad_gpu", "nan": "non_finite_loss", "silent": "silent_node", "death": "process_death"}
"""Each injected fault, and the failure class that the daemon must find."""
WAITS = {"silent": 25.0, "death": 1.0}
"""Seconds that a rule waits: silence must last, and peers of a dead rank may report an earlier death."""
QUIET_UPDATES = 15  # updates of an attempt before the next fault
LOOK_SECONDS = 0.01
_TICKS = os.sysconf("SC_CLK_TCK")

PLAYBOOKS = {
    "unknown.md": {"cordon_per_hour = 4": "cordon_per_hour = 1000", "actions = 40": "actions = 1000"},
    "non_finite_loss.md": {"settle_steps = 500": "settle_steps = 5", "margin_steps = 50": "margin_steps = 5"},
    "process_death.md": {"settle_steps = 50": "settle_steps = 5"},
}

SLURM = {
    "sbatch": 'echo x >> "$SITE/jobs"; echo "Submitted batch job $(wc -l < "$SITE/jobs")"',
    "squeue": """case "$*" in
*%i\\|%T*) for job; do :; done
    if [ "$job" = 1 ]; then echo "1|RUNNING|all|N/A|N/A|opt-ops-1-n0|None"
    else echo "$job|PENDING||N/A|N/A||Resources"; fi ;;
*%N*) echo all ;;
esac""",
    "sacct": "",
    "sinfo": """sed 's/$/|allocated|none/' "$SITE/nodes" """,
    "scontrol": """case "$*" in
"show hostnames"*) cat "$SITE/nodes" ;;
*nodelist=*) echo "${*##*nodelist=}" | tr , '\\n' > "$SITE/nodes.new" && mv "$SITE/nodes.new" "$SITE/nodes" ;;
esac""",
    "scancel": "",
    "srun": "",
}


@dataclass
class Use:
    """CPU and memory use of the processes at a moment."""

    at: float  # monotonic
    daemon: float  # CPU seconds
    children: float  # child processes of the daemon that have ended
    feeder: float
    machine: float  # all CPUs, without idle time
    resident: float  # MiB, of the daemon


@dataclass
class FleetResult:
    """The measurements of one fleet."""

    nodes: int
    uses: list[Use] = field(default_factory=list[Use])
    began_seconds: float = 0.0  # from the daemon's start to the first update
    readings: int = 0  # of GPUs
    delays: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    peak: float = 0.0  # MiB
    load: tuple[float, float] = (0.0, 0.0)

    def cores(self, what: str) -> float:
        """Return the mean number of cores over the whole time."""
        return _cores(self.uses[0], self.uses[-1], what)

    def busiest(self, samples: int = 10) -> float:
        """Return the daemon's cores over its busiest `samples` seconds."""
        return max(
            _cores(a, b, "daemon") for a, b in zip(self.uses, self.uses[samples:] or self.uses[-1:], strict=False)
        )


def _cores(first: Use, last: Use, what: str) -> float:
    return (getattr(last, what) - getattr(first, what)) / max(last.at - first.at, 1e-9)


class Site:
    """The folder of a site: configuration, playbooks, Slurm's commands, and a lineage to start."""

    def __init__(self, folder: Path, nodes: int, spares: int) -> None:
        self.folder = folder
        self.lineage = folder / "runs" / "1"
        shutil.copytree(
            playbook_loader.folder(), folder / "playbooks", ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
        for name, replaced in PLAYBOOKS.items():
            path = folder / "playbooks" / name
            text = path.read_text()
            for old, new in replaced.items():
                assert old in text, f"{old} in {name}"
                text = text.replace(old, new, 1)
            path.write_text(text)
        (folder / "bin").mkdir()
        for name, script in SLURM.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\nSITE='{folder}'\n{script}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "nodes").write_text("\n".join(names(nodes)) + "\n")
        (folder / "opt-ops.toml").write_text(
            f"scheduler = 'slurm'\nplaybooks = 'playbooks'\n[mlflow]\nenabled = false\n"
            f"[health]\ngpus_per_node = {GPUS}\n"
        )
        shape = {"nodes": nodes - spares, "spares": spares, "ranks_per_node": GPUS}
        start = {"lineage": "1", "recipe": "fed", "settings": [], "data": [], "tokenizer": None, "shape": shape}
        FileInbox(self.lineage).put(Request(request="r-1", author="ann", verb="start", arguments=start), time.time())

    def daemon(self) -> subprocess.Popen[bytes]:
        """Start the daemon."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        with (self.folder / "daemon.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "opt_ops", "daemon", "run"],
                env={**os.environ, "PATH": path, "OPT_OPS_CONFIG": str(self.folder / "opt-ops.toml")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def feeder(self, nodes: int, speed: float) -> subprocess.Popen[bytes]:
        """Start the process that writes the files of the fleet."""
        command = [sys.executable, "-m", "benchmarks.fleet_feeder", "--folder", str(self.lineage)]
        return subprocess.Popen(
            [*command, "--nodes", str(nodes), "--speed", str(speed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )


class Lines:
    """Follows a file of JSON lines."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._rest = b""
        os.set_blocking(file.fileno(), False)

    def new(self) -> list[dict[str, Any]]:
        """Return the lines since the last call."""
        *lines, self._rest = (self._rest + (self.file.read() or b"")).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch:
    """Watches the daemon, the feeder and the journal, and injects faults."""

    def __init__(
        self, site: Site, daemon: subprocess.Popen[bytes], feeder: subprocess.Popen[bytes], to: FleetResult
    ) -> None:
        assert feeder.stdout is not None
        self._site, self._daemon, self._feeder, self._to = site, daemon, feeder, to
        self._journal: Lines | None = None
        self._feeds = Lines(feeder.stdout)
        self._updates: dict[str, int] = {}
        self._attempt = ""
        self._fault: dict[str, Any] | None = None
        self._failure = ""
        self._open: set[str] = set()
        self._decided: tuple[float, str] | None = None
        self._lines = 0
        self._sampled = 0.0

    def quiet(self) -> bool:
        """Whether training has continued for a while, and every recovery is proven."""
        return self._updates.get(self._attempt, 0) >= QUIET_UPDATES and not self._open

    def inject(self, kind: str) -> None:
        """Inject a fault, and measure the delay of the decision."""
        self._fault = self._decided = None
        self._send({"fault": kind})
        self.until(lambda: self._fault is not None and self._decided is not None, 120.0)
        assert self._fault is not None
        assert self._decided is not None
        assert self._decided[1] == FAULTS[kind], f"{kind} was taken for {self._decided[1]}"
        self._to.delays.setdefault(kind, []).append(self._decided[0] - self._fault["at"])

    def until(self, what: Callable[[], bool], seconds: float) -> None:
        """Watch until `what` is true."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                journal = (self._site.lineage / "journal" / "000001.jsonl").read_text().splitlines()[-10:]
                log = (self._site.folder / "daemon.log").read_text()[-2000:]
                said = f"fault {self._fault}, decided {self._decided}, open {self._open}, updates {self._updates}"
                raise TimeoutError("\n".join((f"not within {seconds:g} s: {said}", log, *(e[:400] for e in journal))))
            self._look()
            time.sleep(LOOK_SECONDS)

    def wait(self, seconds: float) -> None:
        """Watch for so many seconds."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 60.0)

    def end(self) -> None:
        """End the feeder, which reports how much it wrote."""
        self._send({"stop": True})
        self.until(lambda: self._lines > 0, 60.0)
        self._to.readings = self._lines * GPUS

    def close(self) -> None:
        """Close the files."""
        for file in (self._journal and self._journal.file, self._feeder.stdin, self._feeder.stdout):
            if file is not None:
                file.close()

    def _send(self, words: dict[str, Any]) -> None:
        assert self._feeder.stdin is not None
        self._feeder.stdin.write(json.dumps(words).encode() + b"\n")
        self._feeder.stdin.flush()

    def _look(self) -> None:
        path = self._site.lineage / "journal" / "000001.jsonl"
        if self._journal is None and path.exists():
            self._journal = Lines(path.open("rb", buffering=0))  # type: ignore[arg-type]
        for entry in self._journal.new() if self._journal else ():
            self._take_entry(entry, time.time())
        for line in self._feeds.new():
            if "trained" in line:
                self._attempt = line["attempt"]
                self._updates[self._attempt] = self._updates.get(self._attempt, 0) + 1
            elif "fault" in line:
                self._fault = line
            else:
                self._lines = line["lines"]
        if self._updates and time.monotonic() - self._sampled >= 1.0:
            self._sampled = time.monotonic()
            self._to.uses.append(use(self._daemon.pid, self._feeder.pid))

    def _take_entry(self, entry: dict[str, Any], now: float) -> None:
        if entry["kind"] == "incident_opened":
            self._failure = entry["failure"]
            self._open.add(entry["incident"])
        elif entry["kind"] == "recovery_decided":
            self._decided = self._decided or (now, self._failure)
        elif entry["kind"] == "incident_closed":
            self._open.discard(entry["incident"])


def use(daemon: int, feeder: int) -> Use:
    """Read the use from /proc (proc(5): stat, statm)."""
    fields = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()
    fed = Path(f"/proc/{feeder}/stat").read_text().rpartition(")")[2].split()
    machine = [int(each) for each in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    pages = int(Path(f"/proc/{daemon}/statm").read_text().split()[1])
    return Use(
        at=time.monotonic(),
        daemon=(int(fields[11]) + int(fields[12])) / _TICKS,
        children=(int(fields[13]) + int(fields[14])) / _TICKS,
        feeder=(int(fed[11]) + int(fed[12])) / _TICKS,
        machine=(sum(machine) - machine[3] - machine[4]) / _TICKS,
        resident=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    )


def prioritise(pid: int) -> None:
    """Prioritise a process over other sessions, as if it had a core of its own (sched(7), autogroup; needs root)."""
    Path(f"/proc/{pid}/autogroup").write_text("-15")


def measure(
    nodes: int,
    rounds: int,
    seconds: float,
    speed: float = 1.0,
    seed: int = 1,
    kinds: tuple[str, ...] = tuple(FAULTS),
    ahead: bool = False,
) -> FleetResult:
    """Measure one fleet for `rounds` of faults, and at least `seconds`."""
    to, chance = FleetResult(nodes), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as temporary:
        site = Site(Path(temporary), nodes, spares=max(2, 2 * rounds))
        daemon, feeder = site.daemon(), site.feeder(nodes, speed)
        watch, began = Watch(site, daemon, feeder, to), time.monotonic()
        before = os.getloadavg()[0]
        for pid in (os.getpid(), daemon.pid) if ahead else ():
            prioritise(pid)
        try:
            watch.until(lambda: bool(to.uses), 300.0)
            to.began_seconds = time.monotonic() - began
            for kind in kinds * rounds:
                watch.until(watch.quiet, 300.0)
                watch.wait(chance.uniform(0.0, 2.0))
                watch.inject(kind)
            watch.until(watch.quiet, 300.0)
            watch.wait(max(0.0, to.uses[0].at + seconds - time.monotonic()))
            to.peak = _peak(daemon.pid)
            to.load = (before, os.getloadavg()[0])
            watch.end()
        finally:
            feeder.terminate()
            feeder.wait()
            watch.close()
            _end(daemon)
    return to


def _end(daemon: subprocess.Popen[bytes]) -> None:
    """End the daemon and the processes that draw for it."""
    daemon.terminate()
    try:
        daemon.wait(10.0)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    with suppress(ProcessLookupError):
        os.killpg(daemon.pid, signal.SIGKILL)
        time.sleep(0.5)


def _peak(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def show(measured: list[FleetResult]) -> None:
    """Print both tables in Markdown."""
    print(
        "| nodes | minutes | GPU readings | daemon, cores | busiest 10 s | its children, cores | feeder, cores "
        "| others, cores | load before, after | resident first, last, peak, MiB | start to first update, s |"
    )
    print("|" + " ---: |" * 11)
    for each in measured:
        first, last = each.uses[0], each.uses[-1]
        others = each.cores("machine") - sum(each.cores(what) for what in ("daemon", "children", "feeder"))
        print(
            f"| {each.nodes:,} | {(last.at - first.at) / 60:.1f} | {each.readings:,} | {each.cores('daemon'):.3f} "
            f"| {each.busiest():.3f} | {each.cores('children'):.3f} | {each.cores('feeder'):.3f} | {others:.2f} "
            f"| {each.load[0]:.2f}, {each.load[1]:.2f} | {first.resident:.0f}, {last.resident:.0f}, {each.peak:.0f} "
            f"| {each.began_seconds:.1f} |"
        )
    print("\n| nodes | fault | times | the rule waits, s | beyond that: least, s | median | most |")
    print("| ---: | --- |" + " ---: |" * 5)
    for each in measured:
        for kind, delays in each.delays.items():
            beyond = sorted(delay - WAITS.get(kind, 0.0) for delay in delays)
            print(
                f"| {each.nodes:,} | {FAULTS[kind]} | {len(delays)} | {WAITS.get(kind, 0.0):g} | {beyond[0]:.2f} "
                f"| {statistics.median(beyond):.2f} | {beyond[-1]:.2f} |"
            )


def main() -> None:
    """Run the command: print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=2, help="rounds of four faults")
    parser.add_argument("--seconds", type=float, default=0.0, help="measure for at least so long")
    parser.add_argument("--speed", type=float, default=1.0, help="factor on the rate of agents and trainer")
    parser.add_argument("--ahead", action="store_true", help="prioritise the daemon over other work; needs root")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    print(f"Python {platform.python_version()}; {os.cpu_count()} CPUs\n")
    show([measure(nodes, given.rounds, given.seconds, given.speed, ahead=given.ahead) for nodes in given.nodes])


if __name__ == "__main__":
    main()
