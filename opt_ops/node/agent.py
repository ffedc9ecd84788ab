"""The node agent: one on each held node. It writes heartbeats with readings, and runs what the orders say.

Orders (`orders.json`) are a desired state. The agent starts the ranks of an attempt that names its node, once, and
ends everything that is no longer ordered. So it does not matter how often orders are written, whether the daemon runs,
or which of both starts first. Ranks die with their agent: no rank trains on a node that the supervisor has given up.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opt_ops.errors import OptOpsError
from opt_ops.node.burn_in import InBackground
from opt_ops.node.error_record import ErrorRecord
from opt_ops.node.evaluations import NodeEvaluation, ordered_here
from opt_ops.node.folder_watch import FolderWatch
from opt_ops.node.heartbeat_line import line_of
from opt_ops.node.host import HostProbe
from opt_ops.node.kernel_log import KernelLog, parse_xid
from opt_ops.node.line_process import STARTING
from opt_ops.node.log import PREFIX, log
from opt_ops.node.members_folder import MembersFolder
from opt_ops.node.nvml import Probe
from opt_ops.node.orders import OrdersFile
from opt_ops.node.process_groups import Orphans, adopt_orphans
from opt_ops.node.rank_processes import RankProcesses
from opt_ops.node.standby_ranks import StandbyRanks
from opt_ops.node.warm_process import WarmProcess
from opt_ops.runfolder.permissions import check_trusted, follow_rights_of

HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 0.5
HURRIED_SECONDS = 0.1  # between two looks at the orders while ranks wait for a newer generation
HURRY_SECONDS = 60.0  # so long after a death; then the next generation comes late anyway
READING_DEADLINE = 20.0
FIRST_READING_SECONDS = 10.0  # for the first heartbeat, unless the kernel log has something to say
LAST_SAVE_SECONDS = 15.0  # from the scheduler's SIGTERM to the end of the ranks, for one more checkpoint
LARGEST_HEALTH_FILE = 16 * 1024 * 1024  # bytes; then a new file is started

# Neither a pipe nor a link in place of the file holds the agent up, or makes it write elsewhere.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP
_SIGNALS = {"kill-rank": _KILL, "kill-node": _KILL, "kill-pair": _KILL, "hang": _STOP}


class Agent:
    """The agent of one node for one lineage and one allocation."""

    def __init__(self, folder: Path, node: str, host: str, allocation: str) -> None:
        self._folder = folder
        self._node = node
        self._host = host
        self._allocation = allocation
        self._probe = Probe(HEARTBEAT_SECONDS, READING_DEADLINE)
        self._host_probe = HostProbe(HEARTBEAT_SECONDS, READING_DEADLINE, folder)
        self._started_at = time.monotonic()
        self._kernel_log = KernelLog()
        self._errors = ErrorRecord()
        self._gaps = 0
        self._ranks: RankProcesses | None = None
        self._probe_ranks: RankProcesses | None = None
        """Those of a short run on this node while nothing else needs it."""
        self._members = MembersFolder()
        self._warm = WarmProcess(folder, node)
        self._standbys = StandbyRanks(folder, node, self._members, self._warm)
        self._evaluation = NodeEvaluation(folder)
        self._orphans = Orphans()
        self._hurry_until = 0.0
        self._peer_lost = False  # whether a rank waits for a newer generation
        self._told: tuple[dict[str, int], dict[str, Any] | None] = ({}, None)
        """The numbers of standbys in the last heartbeat, and the evaluation."""
        self._orders_file = OrdersFile(folder, node)
        self._orders: dict[str, Any] = {}
        """The last good orders: they stay in force while there are no newer ones."""
        self._folder_watch = FolderWatch(folder)
        self._said: dict[str, str] = {}
        """The newest trouble of each kind: it is logged once, not twice a second."""
        self._drilled: set[str] = set()
        self._beat_at = 0.0
        self._leaving = False
        self._warned = False  # whether the scheduler has given notice of the end
        self._forwarded = False  # whether the ranks were asked to save for that
        self._terminated_at: float | None = None
        self._save = self._dump = ""  # the newest requests that were passed on
        self._began = False
        self._burn: InBackground | None = None
        self._burned: dict[str, Any] = {}

    def run(self) -> None:
        """Run until the orders release the node, or until SIGTERM."""
        signal.signal(signal.SIGTERM, self._terminate)
        # A script's background process ignores SIGINT. The ranks would inherit that, but SIGINT must end them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # submitit requests USR2, and its own handler would requeue
            signal.signal(number, self._warn)
        self._guard("nothing can be forked from a warm process", adopt_orphans)
        wake = _wake_on_child_exit()
        try:
            while not self._step():
                self._wait(wake)
        finally:
            self._stop_burning()
            self._evaluation.keep(None)
            self._standbys.end()
            self._warm.close()
            self._members.close()
            self._probe.close()
            self._host_probe.close()

    def _wait(self, wake: int) -> None:
        """Wait for the next step: until a child ends, a rank loses a peer, or it is time to look at the orders."""
        now = time.monotonic()
        until = now + (HURRIED_SECONDS if now < self._hurry_until else POLL_SECONDS)
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([wake], [], [], min(left, HURRIED_SECONDS))
            if ready:
                os.read(wake, 4096)
            if ready or self._lost_peer() != self._peer_lost:
                return

    def _lost_peer(self) -> bool:
        return self._ranks is not None and self._ranks.lost_peer

    def _warn(self, *_: object) -> None:
        self._warned = True

    def _terminate(self, *_: object) -> None:
        self._warned = True
        self._terminated_at = self._terminated_at or time.monotonic()

    def _step(self) -> bool:
        if self._folder_watch.is_gone() and not self._leaving:
            log(f"{self._folder} is gone: it was deleted or renamed. The ranks end, and this agent leaves")
            self._leaving = True
        for ranks in self._all_ranks():
            ranks.reporting = self._folder_watch.here
        new = self._orders_file.read()
        self._orders = new or self._orders
        self._act_on_notice()
        if not self._began and self._orders:
            self._began = True
            self._guard("no burn-in", partial(self._burn_in, self._orders))
        self._guard("the kernel log cannot be read", self._take_errors)
        self._guard("the orders cannot be carried out yet", self._carry_out)
        changed = sum(ranks.reap() for ranks in self._all_ranks()) > 0  # each of them is reaped
        lost, told = self._lost_peer(), (self._standbys.counts, self._evaluation.report)
        if changed or (lost and not self._peer_lost):
            self._hurry_until = time.monotonic() + HURRY_SECONDS
        news = changed or lost != self._peer_lost or told != self._told
        self._peer_lost, self._told = lost, told
        if news or time.monotonic() - self._beat_at >= HEARTBEAT_SECONDS:
            self._guard("no heartbeat", self._beat)  # at once after a death: the kernel log may show the cause
            self._orphans.reap(self._children())
        return self._leaving and all(ranks.done for ranks in self._all_ranks())

    def _children(self) -> set[int]:
        """The children that others wait for."""
        return self._warm.pids.union(
            self._standbys.pids, self._evaluation.pids, *(ranks.pids for ranks in self._all_ranks())
        )

    def _all_ranks(self) -> list[RankProcesses]:
        return [ranks for ranks in (self._ranks, self._probe_ranks) if ranks is not None]

    def _carry_out(self) -> None:
        busy = self._leaving or self._terminated_at is not None or self._all_ranks()
        evaluation = None if busy else ordered_here(self._orders, self._node, self._allocation)
        self._evaluation.keep(evaluation)  # first of all: whatever needs the node must not wait
        self._follow(self._orders)
        self._guard("no warm process", partial(self._keep_warm, self._orders))  # after the ranks have taken standbys
        if self._burn is None and self._folder_watch.here:
            warm = self._standbys.ready(self._orders.get("launch"))
            self._guard("no evaluation", partial(self._evaluation.start, evaluation, warm))
        if self._orders:
            self._orders_file.accepted(self._orders)

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """Run a part of a step. Nothing that goes wrong in it may end the ranks; the next step tries again."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  (broad on purpose: an agent that ends takes its ranks with it)
            text = f"{what}: {error if isinstance(error, OSError) else repr(error)}"
            if text != self._said.get(what):
                log(text)
            self._said[what] = text

    def _burn_in(self, orders: dict[str, Any]) -> None:
        """Test the node once, before anything starts there. Skip that if an attempt already needs the node."""
        seconds, launch = orders.get("burn_in_seconds") or 0.0, orders.get("launch")
        wanted = launch and self._node in launch["nodes"]
        if seconds and not wanted:
            self._burn = InBackground(self._node, seconds)

    def _act_on_notice(self) -> None:
        if self._warned and not self._forwarded and self._ranks is not None:
            self._forwarded = True
            self._ranks.save()
        if self._terminated_at is not None:
            idle = self._ranks is None or self._ranks.done
            self._leaving = self._leaving or idle or time.monotonic() - self._terminated_at > LAST_SAVE_SECONDS

    def _follow(self, orders: dict[str, Any]) -> None:
        launch = None if self._leaving else orders.get("launch")
        mine = launch and launch["holders"].get(self._node) == self._allocation
        wanted = launch["attempt"] if launch and mine else None
        if self._ranks is not None and self._ranks.attempt != wanted:
            self._ranks.end(launch if launch and launch["attempt"] == self._ranks.attempt else None)
            if not self._ranks.done:
                self._ranks.reap()
                return
            self._ranks = None
        if not self._folder_watch.here:
            return  # what starts now would create the folder again
        if not self._follow_probe(orders, needed=wanted is not None or self._ranks is not None):
            return
        if wanted is not None and self._ranks is None and self._terminated_at is None:
            self._stop_burning()  # only a daemon process that does not know of the burn-in orders ranks now
            ranks = self._new_ranks(launch or {})
            ranks.start()
            self._ranks = ranks
        elif launch and wanted is not None and self._ranks is not None:
            self._ranks.follow(launch)
        if not orders:
            return
        self._leaving = self._leaving or self._allocation in orders["released"]
        for drill in orders["drills"]:
            self._drill(drill)
        self._ask_ranks(orders)

    def _new_ranks(self, launch: dict[str, Any]) -> RankProcesses:
        return RankProcesses(self._folder, self._node, launch, self._members, self._warm, self._standbys)

    def _keep_warm(self, orders: dict[str, Any]) -> None:
        """Keep a warm process and standbys as the orders say. Tests of the node come first."""
        launch = None if self._leaving else orders.get("launch")
        if not self._folder_watch.here:
            return
        busy = self._burn is not None or self._terminated_at is not None
        named = launch is not None and launch["warm"].get(self._node) == self._allocation and not busy
        self._warm.follow(launch, named)
        probed = any(each["holders"].get(self._node) == self._allocation for each in orders.get("probes", ()))
        if launch is None or not named or (probed and self._node not in launch["holders"]):
            self._standbys.follow(None, 0, may_start=False)
        else:
            self._standbys.follow(launch, launch["standbys"].get(self._node, 0), self._warm.settled(launch))

    def _follow_probe(self, orders: dict[str, Any], needed: bool) -> bool:
        """Run the probe that is ordered here, unless an attempt needs the node. Returns whether the way is free."""
        free = not (needed or self._leaving or self._terminated_at is not None)
        mine = (each for each in orders.get("probes", ()) if each["holders"].get(self._node) == self._allocation)
        wanted = next(mine, None) if free else None
        if self._probe_ranks is not None and (wanted is None or wanted["attempt"] != self._probe_ranks.attempt):
            self._probe_ranks.end()
            if not self._probe_ranks.done:
                self._probe_ranks.reap()
                return not needed
            self._probe_ranks = None
        if wanted is not None and self._probe_ranks is None:
            self._stop_burning()
            if not self._standbys.end():  # a probe measures the node
                return True
            probe = RankProcesses(self._folder, self._node, wanted, self._members)
            probe.start()
            self._probe_ranks = probe
        return True

    def _ask_ranks(self, orders: dict[str, Any]) -> None:
        save, dump = orders.get("save") or "", orders.get("dump") or ""
        new_save, new_dump = save not in ("", self._save), dump not in ("", self._dump)
        self._save, self._dump = save or self._save, dump or self._dump  # once, even if the disk is full
        if self._ranks is not None and new_save:
            self._ranks.save()
        if self._ranks is not None and new_dump:
            self._ranks.dump(dump)

    def _drill(self, drill: dict[str, Any]) -> None:
        if drill["drill"] in self._drilled:
            return
        self._drilled.add(drill["drill"])
        arguments = drill["arguments"]
        ranks, meant = self._ranks, arguments.get("ranks") or [arguments.get("rank")]
        if drill["fault"] in _SIGNALS and ranks is not None and ranks.attempt == arguments.get("attempt"):
            for rank in meant:
                ranks.drill(rank, _SIGNALS[drill["fault"]])
        elif drill["fault"] == "xid" and drill["node"] == self._node and "xid" in arguments:
            line = f"NVRM: Xid (PCI:0000:00:00): {arguments['xid']}, drill {drill['drill']} of opt-ops"
            code, pci, switch = parse_xid(line) or (arguments["xid"], "", False)
            found = {"code": code, "pci": pci, "switch": switch, "line": line, "at": time.time()}
            self._errors.add({**found, "drill": drill["drill"]})

    def _beat(self) -> None:
        reading, machine = self._probe.latest(), self._host_probe.latest()
        if reading is None:
            if not self._errors.entries() and time.monotonic() - self._started_at < FIRST_READING_SECONDS:
                return  # nearly every node: the first reading comes after a second or two
            reading = {"nvml": STARTING, "gpus": []}
        self._beat_at = time.monotonic()
        if self._burn is not None and (found := self._burn.found()) is not None:
            self._burn, self._burned = None, {"burn_in": found, "burned_at": time.time()}
        now, age = time.time(), self._probe.age
        line = {
            "ts": now,
            "node": self._node,
            "host": self._host,
            "pid": os.getpid(),
            "allocation": self._allocation,
            "warned": self._warned,
            "peer_lost": self._peer_lost,
            "standby": self._told[0],
            "evaluation": self._told[1],
            "attempt": self._ranks.attempt if self._ranks else None,
            "orders": self._orders_file.seen,
            "orders_refused": self._orders_file.refused,
            "kernel_log": self._kernel_log.readable,
            "kernel_log_gaps": self._kernel_log.gaps,
            "xids": self._errors.entries(),
            "burning": self._burn is not None,
            "nvml_at": None if age is None else now - age,
            "nvml_lines_left_out": self._probe.left_out,
            "machine": machine,
            **self._burned,
            **reading,
        }
        self._append(line_of(line))

    def _take_errors(self) -> None:
        """Read the kernel log, and NVML's events where it cannot be read or has lost lines: the log has the text."""
        log, events = self._kernel_log, self._probe.xids()
        for found in log.xids():
            self._errors.add(found)
        lost_lines, self._gaps = log.gaps > self._gaps, log.gaps
        for event in events:
            if not log.readable or (lost_lines and not self._errors.has(event["code"], event["pci"])):
                self._errors.add(event)

    def _stop_burning(self) -> None:
        if self._burn is not None:
            self._burn.end()
            self._burn = None

    def _append(self, line: bytes) -> None:
        path = self._folder / "health" / f"{self._node}.jsonl"
        if not self._folder_watch.here:
            return
        try:
            path.parent.mkdir(exist_ok=True)  # never the lineage's own folder: one that was deleted must not come back
            descriptor = os.open(path, _APPEND, 0o644)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise FileExistsError(errno.EEXIST, "it is no regular file")
                file.write(line)
                large = os.fstat(descriptor).st_size > LARGEST_HEALTH_FILE
            if large:
                path.replace(path.with_suffix(".old"))
        except OSError as error:  # the disk may be full; the ranks must continue
            log(f"{path} cannot be written: {error}")


def _wake_on_child_exit() -> int:
    """Return a descriptor that is readable when a child ends: the time of a death is then known to milliseconds."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def main(arguments: list[str] | None = None) -> None:
    """Run an agent. The scheduler adapter starts one on every held node."""
    parser = argparse.ArgumentParser(
        prog="python -m opt_ops.node agent",
        description="The node agent of opt-ops. The scheduler starts it on each held node.",
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of the lineage")
    parser.add_argument("--allocation", required=True, help="allocation that holds the node")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME"), help="default: $SLURMD_NODENAME")
    parser.add_argument("--host", default=socket.gethostname(), help="address at which other nodes reach this one")
    options = parser.parse_args(arguments)
    if not options.node:
        sys.exit(f"{PREFIX} the node has no name. Give --node NAME, or run it as a Slurm task")
    try:
        follow_rights_of(options.folder)
        if warning := check_trusted(options.folder):
            log(warning)
    except (OSError, OptOpsError) as error:
        sys.exit(f"{PREFIX} {error}. {getattr(error, 'hint', '')}")
    Agent(options.folder, options.node, options.host, options.allocation).run()
