"""Evaluations of checkpoints: a command in a process group of its own, on an idle node or beside the daemon.

Whoever needs the place kills the group with SIGKILL and waits for nothing: the results that are there already are in
the lineage's folder, and the same command begins again elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.contract import environment
from opt_ops.contract.exit_codes import EVALUATION_NOT_STARTED
from opt_ops.contract.files import open_append
from opt_ops.node.log import log as say
from opt_ops.node.process_groups import RankProcess

STANDBY_SECONDS = 300.0
"""How long an evaluation waits for the standbys of its node to be ready: they go first."""

_OF_JOBS = ("SLURM_", "PMI_", "PMIX_", "OMPI_")  # libraries take these for the places of ranks


class EvaluationProcess:
    """The processes of one evaluation. They share no variable with those of an attempt, and end with this process."""

    def __init__(self, lineage: Path, evaluation: str, argv: Sequence[str], nice: int) -> None:
        """Start the command, with its output appended to a log in the lineage's folder.

        Raises:
            OSError: it cannot be started.
        """
        self.name = evaluation
        others = (name for name in os.environ if name not in environment.OF_RANKS and not name.startswith(_OF_JOBS))
        variables = {name: os.environ[name] for name in others}
        logs = lineage / "evaluations"
        logs.mkdir(exist_ok=True)
        with open_append(logs / f"{evaluation}.log") as file:
            # Who holds the other end of the pipe is waited for; it closes when this process ends (evaluation_guard.py).
            self._child = subprocess.Popen(
                [sys.executable, "-m", "opt_ops.node.evaluation_guard", str(nice), *argv],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._process = RankProcess(self._child)

    @property
    def pid(self) -> int:
        """The number of its process group."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.code

    def kill(self) -> None:
        """Kill the group."""
        self._process.signal_group(signal.SIGKILL)
        if self._child.stdin is not None:
            self._child.stdin.close()

    def reap(self) -> bool:
        """If it has ended, kill what is left of its group. Returns whether that is so."""
        if self.code is None:
            return False
        self.kill()
        self._process.release()
        return True


def ordered_here(orders: Mapping[str, Any], node: str, allocation: str) -> Mapping[str, Any] | None:
    """The evaluation that is ordered on a node; None if there is none, or if anything else needs the node."""
    order, launches = orders.get("evaluate"), (orders.get("launch"), *orders.get("probes", ()))
    if order is None or (order["node"], order["holder"]) != (node, allocation):
        return None
    named = any(each is not None and each["holders"].get(node) == allocation for each in launches)
    return None if named or allocation in orders["released"] else order


class NodeEvaluation:
    """The evaluation of a node, as the orders say."""

    def __init__(self, lineage: Path) -> None:
        self._lineage = lineage
        self._running: EvaluationProcess | None = None
        self._killed: list[EvaluationProcess] = []
        self._since: tuple[str, float] = ("", 0.0)
        self.report: dict[str, Any] | None = None
        """What the heartbeat says: its name, and its exit code once it has ended."""

    @property
    def pids(self) -> set[int]:
        """The processes that run, or are not reaped yet."""
        return {each.pid for each in (*self._killed, *([self._running] if self._running else ()))}

    def keep(self, order: Mapping[str, Any] | None) -> None:
        """Kill at once what is not this order, and note how it ended if it has. None: the node is needed."""
        self._killed = [each for each in self._killed if not each.reap()]
        if self.report is not None and (order is None or order["evaluation"] != self.report["name"]):
            if self._running is not None:
                self._running.kill()
                self._killed.append(self._running)
            self._running = self.report = None
        if self._running is not None and self.report is not None and self._running.reap():
            self.report = {**self.report, "code": self._running.code}
            self._running = None

    def start(self, order: Mapping[str, Any] | None, standbys_ready: bool) -> None:
        """Start it, unless that was done. Standbys go first, for some minutes. One that cannot be started has ended."""
        if order is None or self.report is not None:
            return
        name = order["evaluation"]
        if self._since[0] != name:
            self._since = name, time.monotonic()
        if not standbys_ready and time.monotonic() - self._since[1] < STANDBY_SECONDS:
            return
        try:
            self._running = EvaluationProcess(self._lineage, name, order["argv"], order["nice"])
        except OSError as error:
            say(f"{name} cannot be started: {error}")
        self.report = {"name": name, "code": None if self._running is not None else EVALUATION_NOT_STARTED}
