"""Holds nodes of a Slurm cluster for one lineage. No call waits for Slurm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from opt_ops.adapters.slurm.answers import NO_JOB, OurJob, columns, hosts, state_of
from opt_ops.adapters.slurm.command import ask
from opt_ops.adapters.slurm.questions import Once, Watched, in_thread
from opt_ops.adapters.slurm.submission import SlurmOptions, submit
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable
from opt_ops.ports import JobState

_T = TypeVar("_T")

_JOB_NAME = "opt-ops-"


class SlurmScheduler:
    """Holds nodes of a Slurm cluster for one lineage."""

    grace_seconds = 30.0  # sbatch may be running when the daemon is killed

    def __init__(self, folder: Path, options: SlurmOptions, agent: Callable[[list[str]], None]) -> None:
        """`agent` runs on every held node, called with its command line."""
        self._folder = folder
        self._options = options
        self._agent = agent
        self._states: dict[OurJob, Watched[JobState]] = {}
        self._questions: dict[str, Once[Any]] = {}
        self._submissions: dict[str, Future[str]] = {}

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job that runs one agent on each node. Returns its id.

        Raises:
            Refused: sbatch refused the job.
            NotYet: sbatch still runs; another call asks for the outcome of the same one.
            SchedulerUnavailable: sbatch or srun failed.
        """
        if allocation not in self._submissions:
            names = allocation, _JOB_NAME + allocation, self._comment(allocation)
            run = partial(submit, self._folder, self._options, self._agent, names, nodes, tuple(exclude))
            self._submissions[allocation] = in_thread(run)
        if not self._submissions[allocation].done():
            raise NotYet("sbatch has not answered yet")
        return self._submissions[allocation].result()

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Return the queued and running jobs of this lineage. Their comment tells them from those of other folders."""
        return self._once("jobs", self._jobs)

    def _jobs(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for number, line in enumerate(ask("squeue", "-h", "--me", "-o", "%i|%j|%k")):
            if number and line.count("|") < 2:
                continue  # a further line of the comment above, which the user of that job wrote
            job, name, comment = columns(line, 3)
            allocation = name.removeprefix(_JOB_NAME)
            if name.startswith(_JOB_NAME) and comment.strip() == self._comment(allocation):
                found.append((job, allocation))
        return found

    def state(self, job: str, allocation: str = "", since: float = 0.0) -> JobState:
        """Return the newest state of a job that is known. Slurm is asked in the background, every few seconds.

        Raises:
            NotYet: Slurm was asked for the first time just now.
            SchedulerUnavailable: the state is not known, or was known too long ago.
        """
        ours = OurJob(number=job, name=f"{_JOB_NAME}{allocation}" if allocation else "", since=since)
        if ours not in self._states:
            self._states[ours] = Watched(partial(state_of, ours, {}))
        return self._states[ours].read()

    def cancel(self, job: str) -> None:
        """Cancel a job."""
        self._once(f"cancel {job}", partial(ask, "scancel", job, may_fail=NO_JOB))

    def drain(self, node: str, reason: str) -> None:
        """Drain a node. Only operators of the cluster may do that.

        Raises:
            Refused: this user may not, or Slurm does not know the node.
        """
        self._once(f"drain {node}", partial(_drain, node, reason))

    def remove_node(self, job: str, node: str) -> None:
        """Remove a node from a job. Otherwise srun aborts the step on all nodes when the node's slurmd returns, in
        spite of --no-kill, because its step is missing there (seen with Slurm 22.05).

        Raises:
            Refused: the job needs this node.
        """
        self._once(f"remove {node}", partial(_remove_node, job, node))

    def _once(self, what: str, question: Callable[[], _T]) -> _T:
        """Ask a question, unless it is open, and return its answer."""
        return self._questions.setdefault(what, Once(question)).take()

    def _comment(self, allocation: str) -> str:
        return f"opt-ops {allocation} of {self._folder}"


def _drain(node: str, reason: str) -> None:
    try:
        ask("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")
    except SchedulerUnavailable as error:
        if "ermission" in str(error) or "Invalid user" in str(error):
            raise Refused(f"not permitted to drain {node}: {error}") from error
        if "Invalid node name" in str(error):
            raise Refused(f"Slurm does not know the node {node}: there is nothing to drain") from error
        raise


def _remove_node(job: str, node: str) -> None:
    held = [each for line in ask("squeue", "-h", "-o", "%N", "-j", job) for each in hosts(line)]
    others = [each for each in held if each != node]
    if not others or others == held:
        return
    try:
        ask("scontrol", "update", f"jobid={job}", f"nodelist={','.join(others)}")
    except SchedulerUnavailable as error:
        if "Invalid node name" in str(error):  # it is the first node, where the job's script ran
            raise Refused(f"job {job} needs its node {node}: {error}") from error
        raise
