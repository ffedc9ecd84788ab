"""Writes the files of a fleet's agents and trainer by one process: heartbeats, reports, telemetry, checkpoints.

It follows `orders.json` as agents do, and injects faults on request. Lines on stdin: `{"fault": "xid"}` (or `nan`,
`silent`, `death`) and `{"stop": true}`. Lines on stdout: `{"fault", "at", "node"}`, where `at` is the time at which the
line that shows the fault was in its file (the last line of a silent node), and `{"trained": step}` after each update.

Every heartbeat has the fields of a real 8-GPU host. Temperatures, power, load, memory and energy change from one to the
next. Each line is one `write`, and a new file starts above a size, as with real agents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from opt_ops.core.names import attempt_folder
from opt_ops.node.agent import HEARTBEAT_SECONDS, LARGEST_HEALTH_FILE, POLL_SECONDS
from tests.e2e.stub_trainer import OPTIMIZER, SCHEDULE, lr_at, save, telemetry

GPUS = 8
STEPS = 1_000_000
SAVE_SECONDS = 10.0
START_SECONDS = 2.0  # from the start of the ranks to the first update
SLICE = 0.02  # seconds between batches of lines: the fleet's agents do not write all at once
_RATES = random.Random(1)


def gpu(node: str, index: int) -> dict[str, Any]:
    """The readings of one healthy GPU."""
    return {
        "index": index,
        "uuid": f"GPU-{node}-{index}",
        "serial": f"S-{node}-{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "pci": f"0000:{0x18 + 0x11 * index:02x}:00",
        "ecc_uncorrected": 0,
        "remap_pending": False,
        "remap_failed": False,
        "rows_remapped": 0,
        "recovery_action": "none",
        "temperature": "@t",
        "power_watts": "@p",
        "energy_joules": "@e",
        "throttle": 0,
        "utilization": "@u",
        "memory_used": "@m",
        "processes": "@c",
        "pcie_width": 16,
        "pcie_generation": 5,
        "pcie_replays": 0,
        "inforom": "G520.0200.00.05",
        "vbios": "96.00.89.00.01",
        "ecc_on": True,
        "ecc_on_next": True,
        "ecc_corrected": 0,
        "ecc_uncorrected_ever": 0,
        "sram_uncorrected_ever": 0,
        "sram_over_threshold": False,
        "retired_pages": None,
        "retired_pending": None,
        "temperature_limit": 87,
        "memory_temperature": "@t",
        "memory_temperature_limit": 95,
        "fabric": "completed",
        "persistence": True,
        "clock_most": 1980,
        "pcie_width_most": 16,
        "pcie_generation_most": 5,
        "nvlinks": 18,
        "nvlink_errors": 0,
    }


def heartbeat(node: str) -> dict[str, Any]:
    """A heartbeat of a host with eight GPUs and InfiniBand ports and an Ethernet adapter; `@…` marks what changes."""
    return {
        "ts": "@ts",
        "node": node,
        "host": f"10.0.{int(node[1:]) // 250}.{int(node[1:]) % 250}",
        "pid": 812,
        "allocation": "@allocation",
        "warned": False,
        "attempt": "@attempt",
        "orders": "@orders",
        "kernel_log": True,
        "xids": "@xids",
        "burning": False,
        "nvml": "ok",
        "driver": "570.86.15",
        "gpus": [gpu(node, index) for index in range(GPUS)],
        "machine": {
            "ports": [{"name": f"mlx5_{port}/1", "active": True, "downed": 0} for port in range(GPUS)],
            "carriers": {"eth0": 1},
            "mounts": {"/": True, "/home": True, "/checkpoints": True},
            "clock_set": True,
            "disk_free": 8 * 2**40,
            "disk_size": 64 * 2**40,
        },
    }


class Node:
    """The health file of one agent."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.attempt: str | None = None
        self.xids = "[]"
        self.silent = False
        self._path = folder / "health" / f"{name}.jsonl"
        self._file = self._open()
        text = json.dumps(heartbeat(name)).replace("%", "%%")
        for what in ("ts", "allocation", "attempt", "orders", "xids"):
            text = text.replace(f'"@{what}"', f"%({what})s")
        for what in "tpeumc":
            text = text.replace(f'"@{what}"', f"%({what})s")
        self._text = text + "\n"
        self._energy = 1e6

    def _open(self) -> int:
        self._written = 0
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def beat(self, orders: str, allocation: str) -> None:
        """Write a heartbeat."""
        chance, busy = _RATES.random(), self.attempt is not None
        watts = (640 if busy else 110) + 60 * chance
        self._energy += HEARTBEAT_SECONDS * watts
        fields = {
            "ts": repr(time.time()),
            "allocation": allocation,
            "attempt": json.dumps(self.attempt),
            "orders": orders,
            "xids": self.xids,
            "t": (60 if busy else 30) + int(7 * chance),
            "p": f"{watts:.3f}",
            "e": f"{self._energy:.3f}",
            "u": 93 + int(7 * chance) if busy else 0,
            "m": 70 * 2**30 + int(chance * 2**30) if busy else 4 * 2**20,
            "c": int(busy),
        }
        self._written += os.write(self._file, (self._text % fields).encode())
        if self._written > LARGEST_HEALTH_FILE:
            os.close(self._file)
            self._path.replace(self._path.with_suffix(".old"))
            self._file = self._open()


class Fleet:
    """All agents, and rank 0 of the attempt that they run."""

    def __init__(self, folder: Path, nodes: int, speed: float) -> None:
        """`speed`: factor on the rate at which agents and trainer write."""
        self._folder = folder
        self._speed = speed
        (folder / "health").mkdir(parents=True, exist_ok=True)
        self.nodes = {name: Node(folder, name) for name in names(nodes)}
        self._allocation = '"1-n0"'
        self._orders: dict[str, Any] = {}
        self._seen = "[0, 0]"
        self._launch: dict[str, Any] | None = None
        self._next_step = self._saved = 0.0
        self._step = 0
        self._stuck = False  # whether ranks wait for a dead one
        self._wanted: list[str] = []
        self._next = 0  # node to write
        self.lines = 0

    def run(self) -> None:
        """Write until the request to stop."""
        began = polled = time.monotonic()
        beats = 0
        order = list(self.nodes.values())
        rate = len(order) * self._speed / HEARTBEAT_SECONDS
        while self._read_requests():
            now = time.monotonic()
            if now - polled >= POLL_SECONDS:
                polled = now
                self._follow()
            due = int((now - began) * rate)
            for _ in range(due - beats):
                node = order[self._next]
                self._next = (self._next + 1) % len(order)
                if not node.silent:
                    node.beat(self._seen, self._allocation)
                    self.lines += 1
            beats = due
            self._train()
            time.sleep(max(0.0, SLICE - (time.monotonic() - now)))
        report(lines=self.lines)

    def _read_requests(self) -> bool:
        while select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line or json.loads(line).get("stop"):
                return False
            self._wanted.append(json.loads(line)["fault"])
        while self._wanted:
            self._fault(self._wanted.pop(0))
        return True

    def _follow(self) -> None:
        try:
            self._orders = json.loads((self._folder / "orders.json").read_text())
        except FileNotFoundError:
            return
        self._seen = json.dumps([self._orders["epoch"], self._orders["seq"]])
        launch = self._orders["launch"]
        if self._launch is not None and (launch is None or launch["attempt"] != self._launch["attempt"]):
            for number, name in enumerate(self._launch["nodes"]):
                self._report(number, GPUS, {"signal": 2})
                self.nodes[name].attempt = None
            self._launch = None
        if launch is not None and self._launch is None:
            self._start(launch)

    def _start(self, launch: dict[str, Any]) -> None:
        self._launch, self._stuck, self._allocation = launch, False, json.dumps(next(iter(launch["holders"].values())))
        folder = self._folder / attempt_folder(launch["attempt"])
        (folder / "nodes").mkdir(parents=True)
        for number, name in enumerate(launch["nodes"]):
            self.nodes[name].attempt = launch["attempt"]
            self._report(number)
        options = _options(launch["argv"])
        resume = options.get("--resume", [""])[0]
        self._step = int(resume.rpartition("-")[2]) if resume else 0
        pairs = [pair.partition(":") for pair in options.get("--lr-factor", [])]
        self._factors = [(int(step), float(factor)) for step, _, factor in pairs]
        self._checkpoints = Path(options["--checkpoint-dir"][0])
        self._telemetry = folder / "telemetry.jsonl"
        self._schedule = {**SCHEDULE, "total_steps": STEPS}
        config = {"v": 1, "steps": STEPS, "schedule": self._schedule, "optimizer": OPTIMIZER}
        _replace(folder / "config.json", {**config, "versions": {}, "layout": {}})
        self._saved = time.monotonic()
        self._next_step = time.monotonic() + START_SECONDS

    def _report(self, number: int, over: int = 0, how: dict[str, Any] | None = None) -> None:
        """Write the report of a node's agent on its ranks, of which the first `over` have ended."""
        assert self._launch is not None
        runs = {"code": None, "signal": None, "ended": None}
        ended = {**runs, "ended": time.time(), **(how or {})}
        name, attempt = self._launch["nodes"][number], self._launch["attempt"]
        ranks = [
            {"rank": number * GPUS + each, "pid": 4711 + each, **(ended if each < over else runs)}
            for each in range(GPUS)
        ]
        path = self._folder / attempt_folder(attempt) / "nodes" / f"{name}.json"
        _replace(path, {"v": 1, "node": name, "attempt": attempt, "started": time.time(), "ranks": ranks})

    def _train(self) -> None:
        if self._launch is None or self._stuck or time.monotonic() < self._next_step:
            return
        self._next_step = time.monotonic() + 1.0 / self._speed
        self._update(loss=2.5 + 0.01 * (self._step % 5))

    def _update(self, loss: float | None) -> None:
        assert self._launch is not None
        self._step += 1
        lr = lr_at(self._step, self._schedule, self._factors)["lr"]
        line = telemetry(self._step, lr, loss, 1.0 / self._speed)
        with self._telemetry.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        if loss is not None and time.monotonic() - self._saved >= SAVE_SECONDS:
            self._saved = time.monotonic()
            save(self._checkpoints, self._step, self._launch["attempt"], line, "")
        report(trained=self._step, attempt=self._launch["attempt"])

    def _fault(self, kind: str) -> None:
        if self._launch is None:
            report(fault=kind, at=None, node=None)
            return
        number = len(self._launch["nodes"]) - 1
        name = self._launch["nodes"][number]
        node = self.nodes[name]
        self._stuck = True
        if kind == "xid":
            text = "NVRM: Xid (PCI:0000:3a:00): 79, pid=4711, GPU has fallen off the bus."
            xid = {"code": 79, "pci": "0000:3a:00", "line": text, "at": time.time(), "switch": False, "drill": None}
            node.xids = json.dumps([xid])
            node.beat(self._seen, self._allocation)
        elif kind == "silent":
            node.beat(self._seen, self._allocation)
            node.silent = True
        elif kind == "death":
            self._report(number, 1, {"signal": 9})
        else:
            self._update(loss=None)
        report(fault=kind, at=time.time(), node=name)


def names(nodes: int) -> list[str]:
    """Return the names of the fleet's nodes."""
    return [f"n{number:04d}" for number in range(nodes)]


def report(**fields: Any) -> None:
    """Write a line to the process that started this one."""
    print(json.dumps(fields), flush=True)


def _options(argv: list[str]) -> dict[str, list[str]]:
    """Parse the trainer's command line."""
    found: dict[str, list[str]] = {}
    for name, value in pairwise(argv):
        if name.startswith("--"):
            found.setdefault(name, []).append(value)
    return found


def _replace(path: Path, value: Any) -> None:
    """Replace a file by rename, as agents do, but without a sync: this disk is not the fleet's file system."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def main() -> None:
    """Run the command: write into one lineage's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--speed", type=float, required=True)
    given = parser.parse_args()
    Fleet(given.folder, given.nodes, given.speed).run()


if __name__ == "__main__":
    main()
