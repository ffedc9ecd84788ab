"""This machine as a cluster: several "nodes", each with its own agent and processes.

A submission starts the agents as sessions of their own, so that they outlive the daemon. The process ids are written
beside the journal with each process's start time, because the system uses the id of an ended process again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_ops.contract.files import open_append
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import OptOpsError, Refused, SchedulerUnavailable
from opt_ops.ports import JobState
from opt_ops.runfolder.files import read_json, write_json


class LocalScheduler:
    """Starts and stops node agents on this machine for one lineage."""

    grace_seconds = 5.0  # an earlier daemon may have been killed between the start of agents and the write of their ids

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self._folder = folder
        self._nodes = tuple(nodes)
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Start an agent on each of the first `nodes` nodes that are not excluded.

        Raises:
            Refused: too few nodes are left.
            SchedulerUnavailable: an agent could not be started. Those that were are ended.
        """
        free = [node for node in self._nodes if node not in exclude]
        if len(free) < nodes:
            used = ", ".join(exclude) or "none"
            if not free:
                raise Refused(f"no node is left on this machine: {used} are excluded or in use")
            left = f"{nodes} wanted, {len(free)} left ({', '.join(free)})"
            raise Refused(f"too few nodes on this machine: {left}; excluded or in use: {used}")
        started: list[dict[str, Any]] = []
        try:
            for node in free[:nodes]:
                started.append({"node": node, **self._start_agent(node, allocation)})
                write_json(self._path(allocation), started)
        except OSError as error:  # no process is left, or the disk is full
            for agent in started:
                _end(agent)
            raise SchedulerUnavailable(
                f"an agent could not be started: {error}", "opt-ops doctor; free processes, or space"
            ) from error
        return allocation

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Return the allocations with a running agent; each is its own job."""
        names = [path.stem for path in (self._folder / "agents").glob("*.json")]
        return [(name, name) for name in names if any(map(_alive, self._agents(name)))]

    def state(self, job: str, allocation: str = "", since: float = 0.0) -> JobState:  # noqa: ARG002
        """Return the state of a job: it runs while one of its agents runs."""
        agents = self._agents(job)
        for child in self._children.values():
            child.poll()
        alive = tuple(agent["node"] for agent in agents if _alive(agent))
        if alive:
            return JobState(AllocationStatus.RUNNING, tuple(agent["node"] for agent in agents), "")
        return JobState(AllocationStatus.ENDED, (), "no agent is running")

    def cancel(self, job: str) -> None:
        """Send SIGTERM to the agents, which end their ranks first."""
        for agent in self._agents(job):
            _end(agent)

    def drain(self, node: str, reason: str) -> None:
        """Refuse: a local node is used by nobody else.

        Raises:
            Refused: always.
        """
        raise Refused(f"{node} is a local node, which cannot be drained ({reason}); opt-ops only excludes it")

    def remove_node(self, job: str, node: str) -> None:
        """Do nothing: local agents do not depend on each other."""

    def _agents(self, allocation: str) -> list[dict[str, Any]]:
        """The agents that were started; none if the file is not there."""
        path = self._path(allocation)
        try:
            found = read_json(path)
        except (OSError, OptOpsError) as error:
            raise SchedulerUnavailable(f"{path} cannot be read: {error}") from error
        agents: list[Any] = found if isinstance(found, list) else []
        if found is not None and not (agents and all(map(_is_agent, agents))):
            raise SchedulerUnavailable(f"{path} is damaged: which agents run is not known")
        return agents

    def _path(self, allocation: str) -> Path:
        return self._folder / "agents" / f"{allocation}.json"

    def _start_agent(self, node: str, allocation: str) -> dict[str, Any]:
        logs = self._folder / "agents"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "opt_ops.node", "agent", "--folder", str(self._folder), "--node", node]
        with open_append(logs / f"{node}.log") as log:
            process = subprocess.Popen(
                [*command, "--allocation", allocation, "--host", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[process.pid] = process
        return {"pid": process.pid, "started": _start_time(process.pid)}


def _start_time(pid: int) -> int | None:
    """Start time in clock ticks since boot; None if the process has ended or is a zombie (proc(5), stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:  # such as no file descriptor left
        raise SchedulerUnavailable(f"whether process {pid} runs is not known: {error}") from error
    return None if fields[0] == "Z" else int(fields[19])


def _alive(agent: dict[str, Any]) -> bool:
    return agent["started"] is not None and _start_time(agent["pid"]) == agent["started"]


def _end(agent: dict[str, Any]) -> None:
    if _alive(agent):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(agent["pid"], signal.SIGTERM)


def _is_agent(found: Any) -> bool:
    """Whether it is what `submit` wrote. A process id below 2 would be everybody."""
    if not isinstance(found, dict):
        return False
    pid, started = found.get("pid"), found.get("started")
    whole = isinstance(pid, int) and not isinstance(pid, bool) and pid > 1
    return whole and isinstance(found.get("node"), str) and (started is None or isinstance(started, int))
