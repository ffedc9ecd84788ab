"""The node agent: one on each held node. It reports readings and heartbeats, and runs what the orders say.

Orders are a wish about the state of things (`orders.json`): the agent starts the ranks of an attempt that names its
node, once, and ends whatever it runs that is not ordered any more. So it does not matter how often an order is
written, whether the daemon lives, or in which order they come up. Ranks die with their agent: a node that was given
up cannot go on training behind the supervisor's back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from opt_ops.adapters.kernel_log import KernelLog, parse_xid
from opt_ops.adapters.nvml import Probe
from opt_ops.core.run import attempt_folder
from opt_ops.files import create_json, read_json, write_json

HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 0.5
READING_DEADLINE = 20.0
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
LARGEST_HEALTH_FILE = 16 * 1024 * 1024

_PR_SET_PDEATHSIG = 1


class Ranks:
    """This node's processes of one attempt, and the report on them."""

    def __init__(self, folder: Path, node: str, launch: dict[str, Any]) -> None:
        self.attempt: str = launch["attempt"]
        self._path = folder / attempt_folder(self.attempt) / "nodes" / f"{node}.json"
        self._logs = folder / attempt_folder(self.attempt) / "logs"
        self._node = node
        self._launch = launch
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._report: dict[str, Any] = {"v": 1, "node": node, "attempt": self.attempt, "started": time.time()}
        self._killed_at: float | None = None
        self._saved = True

    def start(self) -> None:
        """Start them, unless they were started before: an attempt is started at most once on a node."""
        per_node = self._launch["ranks_per_node"]
        first = self._launch["nodes"].index(self._node) * per_node
        ranks = [{"rank": first + i, "pid": None, "code": None, "signal": None, "ended": None} for i in range(per_node)]
        self._report["ranks"] = ranks
        if not create_json(self._path, self._report):
            self._bury()
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        for local, entry in enumerate(ranks):
            try:
                self._processes[local] = self._spawn(entry["rank"], local)
                entry["pid"] = self._processes[local].pid
            except OSError as error:
                self._log(entry["rank"]).write_text(f"cannot start {self._launch['argv'][0]}: {error}\n")
                entry["code"], entry["ended"] = 127, time.time()
        self._save()

    def _bury(self) -> None:
        """An earlier agent of this node started them, and they died with it."""
        self._report = read_json(self._path) or self._report
        for entry in self._report["ranks"]:
            if entry["ended"] is None:
                entry["signal"], entry["ended"] = int(signal.SIGKILL), time.time()
        self._save()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank:04d}.log"

    def _save(self) -> None:
        try:
            write_json(self._path, self._report)
            self._saved = True
        except OSError as error:  # a full disk must not end the ranks; the report is written when there is room
            self._saved = False
            print(f"opt_ops.agent: {self._path}: {error}", file=sys.stderr)

    def _spawn(self, rank: int, local: int) -> subprocess.Popen[bytes]:
        launch = self._launch
        environment = {
            **os.environ,
            **launch["environment"],
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(len(launch["nodes"]) * launch["ranks_per_node"]),
            "LOCAL_WORLD_SIZE": str(launch["ranks_per_node"]),
            "MASTER_ADDR": launch["address"],
            "MASTER_PORT": str(launch["port"]),
            "PYTHONUNBUFFERED": "1",
        }
        with self._log(rank).open("ab") as log:
            return subprocess.Popen(
                launch["argv"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  (the agent has no threads)
            )

    def reap(self) -> None:
        """Note who has ended since the last call."""
        news = not self._saved
        for local, process in self._processes.items():
            entry = self._report["ranks"][local]
            if entry["ended"] is None and (code := process.poll()) is not None:
                entry["code"], entry["signal"] = (code, None) if code >= 0 else (None, -code)
                entry["ended"] = time.time()
                news = True
        if news:
            self._save()

    def kill(self, rank: int) -> None:
        """A drill: SIGKILL to one rank."""
        for local in self._processes:
            if self._report["ranks"][local]["rank"] == rank:
                self._signal(local, signal.SIGKILL)

    def end(self) -> None:
        """SIGTERM at the first call, SIGKILL to what is left after the grace."""
        if self._killed_at is None:
            self._killed_at = time.monotonic()
            number = signal.SIGTERM
        elif time.monotonic() - self._killed_at > GRACE_SECONDS:
            number = signal.SIGKILL
        else:
            return
        for local in self._processes:
            self._signal(local, number)

    def _signal(self, local: int, number: signal.Signals) -> None:
        if self._processes[local].poll() is None:
            os.killpg(self._processes[local].pid, number)

    @property
    def done(self) -> bool:
        """Whether none of them runs any more."""
        return all(entry["ended"] is not None for entry in self._report["ranks"])


class Agent:
    """One node's agent for one lineage."""

    def __init__(self, folder: Path, node: str, host: str) -> None:
        self._folder = folder
        self._node = node
        self._host = host
        self._probe = Probe(HEARTBEAT_SECONDS, READING_DEADLINE)
        self._log = KernelLog()
        self._xids: list[dict[str, Any]] = []
        self._ranks: Ranks | None = None
        self._orders_seen = (0, 0)
        self._drilled: set[str] = set()
        self._beat_at = 0.0
        self._leaving = False

    def run(self) -> None:
        """Until the orders release the node, or SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_leaving", True))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's handler of it would requeue the job
        wake = _wake_on_child_exit()
        try:
            while not self._step():
                ready, _, _ = select.select([wake], [], [], POLL_SECONDS)
                if ready:
                    os.read(wake, 4096)
        finally:
            self._probe.close()

    def _step(self) -> bool:
        orders = read_json(self._folder / "orders.json") or {}
        seen = (orders.get("epoch", 0), orders.get("seq", 0))
        if seen >= self._orders_seen:  # an older life of the daemon may still write; it is not obeyed
            self._follow(orders)
            self._orders_seen = seen
        if self._ranks is not None:
            self._ranks.reap()
        if time.monotonic() - self._beat_at >= HEARTBEAT_SECONDS:
            self._beat()
        return self._leaving and (self._ranks is None or self._ranks.done)

    def _follow(self, orders: dict[str, Any]) -> None:
        launch = None if self._leaving else orders.get("launch")
        wanted = launch["attempt"] if launch and self._node in launch["nodes"] else None
        if self._ranks is not None and self._ranks.attempt != wanted:
            self._ranks.end()
            if not self._ranks.done:
                self._ranks.reap()
                return
            self._ranks = None
        if wanted is not None and self._ranks is None:
            self._ranks = Ranks(self._folder, self._node, launch or {})
            self._ranks.start()
        for drill in orders.get("drills", ()):
            self._drill(drill)
        self._leaving = self._leaving or bool(orders.get("release"))

    def _drill(self, drill: dict[str, Any]) -> None:
        if drill["drill"] in self._drilled:
            return
        self._drilled.add(drill["drill"])
        arguments = drill["arguments"]
        if drill["fault"] == "kill-rank" and self._ranks is not None and self._ranks.attempt == arguments["attempt"]:
            self._ranks.kill(arguments["rank"])
        elif drill["fault"] == "xid" and drill["node"] == self._node:
            line = f"NVRM: Xid (PCI:0000:00:00): {arguments['xid']}, drill {drill['drill']} of opt-ops"
            code, pci = parse_xid(line) or (arguments["xid"], "")
            self._xids.append({"code": code, "pci": pci, "line": line, "at": time.time(), "drill": drill["drill"]})

    def _beat(self) -> None:
        reading = self._probe.latest()
        if reading is None:
            return
        self._beat_at = time.monotonic()
        self._xids += self._log.xids()
        line = {
            "ts": time.time(),
            "node": self._node,
            "host": self._host,
            "pid": os.getpid(),
            "attempt": self._ranks.attempt if self._ranks else None,
            "orders": self._orders_seen,
            "kernel_log": self._log.readable,
            "xids": self._xids[-32:],
            **reading,
        }
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def _append(self, line: bytes) -> None:
        path = self._folder / "health" / f"{self._node}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(line)
                large = file.tell() > LARGEST_HEALTH_FILE
            if large:
                path.replace(path.with_suffix(".old"))
        except OSError as error:  # the disk may be full; the ranks go on
            print(f"opt_ops.agent: {path}: {error}", file=sys.stderr)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wake_on_child_exit() -> int:
    """A descriptor that becomes readable when a child ends, so that the moment of a death is known to milliseconds."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def main(arguments: list[str] | None = None) -> None:
    """Run an agent; the scheduler's adapter starts it on every held node."""
    parser = argparse.ArgumentParser(description="The node agent of opt-ops; started by the daemon's scheduler.")
    parser.add_argument("--folder", type=Path, required=True, help="the lineage's folder")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME"), help="default: $SLURMD_NODENAME")
    parser.add_argument("--host", default=socket.gethostname(), help="where other nodes find this one")
    options = parser.parse_args(arguments)
    if not options.node:
        sys.exit("opt_ops.agent: which node is this? Give --node, or run it as a Slurm task")
    Agent(options.folder, options.node, options.host).run()


if __name__ == "__main__":
    main()
