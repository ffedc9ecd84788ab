"""What one daemon costs that watches a whole fleet through the run folder.

    python -m benchmarks.fleet --nodes 16 128 512 2048 --ticks 130

The supervisor, its watchers, the journal and the run folder's files are the real ones, on a local disk; agents and
trainer are a feeder that writes what they would: a heartbeat of 8 GPUs for each node every two seconds, a line of
telemetry a second, a report for each node. The feeder and the supervisor take turns, one tick for each second of
readings, so that only the supervisor is measured, also where fewer cores are free than a fleet would write with: CPU
seconds of a tick, one a second, are cores.

Half way an Xid 79 is written. From the tick that can first see it to the journaled decision takes that tick's CPU
seconds, where the daemon has a core; a tick may be a second away.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_ops.act import Site
from opt_ops.adapters.runfolder import FileAgents, FileInbox, FileTrainer
from opt_ops.core.events import RecoveryDecided
from opt_ops.core.values import AllocationStatus, Checkpoint, Severity
from opt_ops.files import write_json
from opt_ops.journal import read
from opt_ops.ports import Alert, JobState, Ports, Request
from opt_ops.supervisor import Life, Supervisor
from playbooks import loader

GPUS = 8
HEADINGS = (
    "nodes",
    "GPU readings",
    "cores",
    "ms per tick and node",
    "slowest tick, CPU s",
    "tick with a decision, CPU s",
    "resident, MiB",
    "grown since the first quarter, MiB",
)


class Clock:
    """Seconds that pass as the feeder says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """As the port says."""
        return 1_800_000_000.0 + self.seconds

    def monotonic(self) -> float:
        """As the port says."""
        return self.seconds


class Held:
    """A scheduler that gives every node it is asked for, and nothing else."""

    grace_seconds = 30.0

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = tuple(nodes)
        self._submitted: list[tuple[str, str]] = []

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:  # noqa: ARG002
        """As the port says."""
        self._submitted.append((str(len(self._submitted)), allocation))
        return self._submitted[-1][0]

    def jobs(self) -> Sequence[tuple[str, str]]:
        """As the port says."""
        return self._submitted

    def state(self, job: str) -> JobState:
        """As the port says."""
        status = AllocationStatus.RUNNING if job == "0" else AllocationStatus.QUEUED
        return JobState(status, self._nodes if job == "0" else (), "")

    def cancel(self, job: str) -> None:
        """Nothing."""

    def drain(self, node: str, reason: str) -> None:
        """Nothing."""


class Nothing:
    """No checkpoints, and nobody to tell."""

    def committed(self, run: str) -> Sequence[Checkpoint]:  # noqa: ARG002
        """As the port says."""
        return ()

    def examine(self, checkpoint: Checkpoint) -> None:
        """Nothing."""

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """As the port says."""
        return ()

    def send(self, alert: Alert) -> None:
        """Nothing."""

    def delivered(self) -> Sequence[tuple[str, str]]:
        """As the port says."""
        return ()


class Feeder:
    """Writes what agents and trainer would."""

    def __init__(self, folder: Path, nodes: Sequence[str], clock: Clock) -> None:
        self._folder = folder
        self._nodes = nodes
        self._clock = clock
        self._attempt: str | None = None
        self._beats = 0
        self.readings = 0
        self.xid: str | None = None
        (folder / "health").mkdir(parents=True)

    def second(self) -> None:
        """One second's worth: half of the nodes, and a step."""
        orders = self._orders()
        launch = orders.get("launch")
        if launch and launch["attempt"] != self._attempt:
            self._start(launch)
        part = self._nodes[self._beats % 2 :: 2]
        self._beats += 1
        for name in part:
            line = json.dumps(self._heartbeat(name, [orders.get("epoch", 0), orders.get("seq", 0)]))
            with (self._folder / "health" / f"{name}.jsonl").open("a") as file:
                file.write(line + "\n")
        self.readings += GPUS * len(part)
        if self._attempt is not None and launch:
            with (self._attempt_folder() / "telemetry.jsonl").open("a") as file:
                file.write(json.dumps(self._telemetry()) + "\n")

    def _orders(self) -> dict[str, Any]:
        path = self._folder / "orders.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _attempt_folder(self) -> Path:
        run, _, number = str(self._attempt).partition("-")
        return self._folder / run / number

    def _start(self, launch: dict[str, Any]) -> None:
        if self._attempt is not None:
            self._report(self._ended)
        self._attempt, self._launch, self._step = launch["attempt"], launch, 0
        (self._attempt_folder() / "nodes").mkdir(parents=True)
        schedule = {"peak_lr": 1e-4, "warmup_steps": 10, "total_steps": 10**6, "final_fraction": 0.1}
        optimizer = {"betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0}
        config = {"steps": 10**6, "schedule": schedule, "optimizer": optimizer, "versions": {}, "layout": {}}
        write_json(self._attempt_folder() / "config.json", config)
        self._report(lambda rank: {"rank": rank, "code": None, "signal": None, "ended": None})

    @staticmethod
    def _ended(rank: int) -> dict[str, Any]:
        return {"rank": rank, "code": None, "signal": 15, "ended": 1.0}

    def stop(self) -> None:
        """Ranks that are told to end have ended."""
        if self._attempt is not None and not self._orders().get("launch"):
            self._report(self._ended)
            self._attempt = None

    def _report(self, rank_of: Any) -> None:
        for number, name in enumerate(self._launch["nodes"]):
            ranks = [rank_of(number * GPUS + each) for each in range(GPUS)]
            fields = {"node": name, "started": self._clock.now(), "ranks": ranks}
            (self._attempt_folder() / "nodes" / f"{name}.json").write_text(json.dumps(fields))

    def _heartbeat(self, name: str, orders: list[int]) -> dict[str, Any]:
        xids = []
        if name == self.xid:
            line = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus"
            xids = [{"code": 79, "pci": "0000:3b:00", "line": line, "at": self._clock.now()}]
        return {
            "node": name,
            "host": name,
            "ts": self._clock.now(),
            "attempt": self._attempt,
            "nvml": "ok",
            "orders": orders,
            "gpus": [self._gpu(name, index) for index in range(GPUS)],
            "xids": xids,
            "allocation": "1-n0",
            "driver": "570.00",
        }

    def _gpu(self, name: str, index: int) -> dict[str, Any]:
        warm = (self._beats + index) % 7
        return {
            "index": index,
            "uuid": f"GPU-{name}-{index}",
            "serial": f"S-{name}-{index}",
            "name": "simulated",
            "vbios": "96.00",
            "recovery_action": "none",
            "ecc_on": True,
            "ecc_on_next": True,
            "ecc_uncorrected": 0,
            "ecc_corrected": warm,
            "ecc_uncorrected_ever": 0,
            "sram_uncorrected_ever": 0,
            "sram_over_threshold": False,
            "remap_pending": False,
            "remap_failed": False,
            "rows_remapped": 0,
            "temperature": 60 + warm,
            "temperature_limit": 87,
            "power_watts": 600.0 + warm,
            "throttle": 0,
            "utilization": 98,
            "memory_used": 70 * 2**30,
            "processes": 1,
            "persistence": True,
            "clock_most": 1980,
            "pcie_width": 16,
            "pcie_width_most": 16,
            "pcie_generation": 5,
            "pcie_generation_most": 5,
            "pcie_replays": 0,
            "nvlinks": 18,
            "nvlink_errors": 0,
        }

    def _telemetry(self) -> dict[str, Any]:
        self._step += 1
        return {
            "ts": self._clock.now(),
            "num_updates": self._step,
            "loss": 2.5 + 0.01 * (self._step % 5),
            "gnorm": 0.3,
            "lr": 1e-4 * min(self._step / 10, 1.0),
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "step_seconds": 1.0,
            "tokens": self._step,
            "wps": 1.0,
            "finite": True,
        }


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one fleet."""

    nodes: int
    readings: int
    cores: float  # mean CPU seconds of a tick, one a second
    slowest: float  # CPU seconds
    decided: float | None  # CPU seconds from the start of the tick that sees the Xid to the decision
    memory: float  # MiB that the process grew by between a quarter and the end
    resident: float


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(nodes: int, ticks: int) -> Cost:
    """Feed one fleet."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, clock = Path(temporary) / "1", Clock()
        names = [f"n{number:04d}" for number in range(nodes)]
        feeder = Feeder(folder, names, clock)
        nothing = Nothing()
        shape = {"nodes": nodes - 2, "spares": 2, "ranks_per_node": GPUS}
        start = {"lineage": "1", "recipe": "x", "settings": [], "data": [], "tokenizer": None, "shape": shape}
        FileInbox(folder).put(Request(request="r-1", author="ann", verb="start", arguments=start), 0.0)
        policy, _ = loader.load(loader.folder(), expected_gpus=GPUS)
        ports = Ports(
            clock=clock,
            scheduler=Held(names),
            agents=FileAgents(folder),
            trainer=FileTrainer(folder),
            checkpoints=nothing,
            inbox=FileInbox(folder),
            notifier=nothing,
        )
        site = Site(folder=str(folder), trainer=("train",))
        life = Life(host="here", pid=1, last_sign=None)
        supervisor = Supervisor(folder, ports, replace(policy, least_alert=Severity.PAGE), site, life)
        spent: list[float] = []
        decided, first = None, 0.0
        for tick in range(ticks):
            clock.seconds += 1.0
            if tick == ticks // 2:
                feeder.xid = names[5]
            feeder.second()
            feeder.stop()
            incidents = len(supervisor.state.incidents)
            began = time.process_time()
            supervisor.tick()
            spent.append(time.process_time() - began)
            if decided is None and len(supervisor.state.incidents) > incidents:
                decided = spent[-1]
            if tick == ticks // 4:
                first = resident()
        last = resident()
        supervisor.close()
        entries, _ = read(folder / "journal")
        assert any(isinstance(entry.event, RecoveryDecided) for entry in entries), "the Xid was not answered"
        steady = spent[10:]
        return Cost(nodes, feeder.readings, sum(steady) / len(steady), max(steady), decided, last - first, last)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 128, 512, 2048])
    parser.add_argument("--ticks", type=int, default=130, help="seconds of readings")
    given = parser.parse_args()
    print(f"Python {platform.python_version()}; {given.ticks} ticks.\n")
    print(f"| {' | '.join(HEADINGS)} |\n| {' | '.join('---:' for _ in HEADINGS)} |")
    costs = [measure(nodes, given.ticks) for nodes in given.nodes]
    for cost in costs:
        decided = "-" if cost.decided is None else f"{cost.decided:.3f}"
        print(
            f"| {cost.nodes:,} | {cost.readings:,} | {cost.cores:.3f} | {1000 * cost.cores / cost.nodes:.3f} | "
            f"{cost.slowest:.3f} | {decided} | {cost.resident:.0f} | {cost.memory:.1f} |"
        )


if __name__ == "__main__":
    main()
