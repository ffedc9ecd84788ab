"""Slurm: submitit submits a job that holds the nodes and runs an agent on each; squeue, sacct and sinfo report on it.

Only text with explicit columns is read, because Slurm's JSON changes between releases. A command that fails or does not
answer means *unknown*, never gone. Only the supervisor restarts anything: Slurm and submitit must not requeue.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from opt_ops.core.values import PREEMPTED, AllocationStatus
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable
from opt_ops.ports import JobState

_T = TypeVar("_T")

_JOB_NAME = "opt-ops-"

POLL_SECONDS = 5.0  # between two questions about one job: slurmctld serves other users, too
TIMEOUT_SECONDS = 20.0
ANSWER_SECONDS = 2.0  # a tick waits so long for an answer; a later tick takes a late one
NOTICE_SECONDS = 120  # from the notice to the time limit
PREEMPTION_CHECK_SECONDS = 600.0  # so long before the end of a job, ask whether a preemption brought it forward

_QUEUED = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
_ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
    }
)

# Settings of users that would change the columns we read.
_FORMATS = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS")

_NO_JOB = "Invalid job id"  # slurmctld does not know the job: it never existed, or it ended long ago

# sbatch reports that a job can never run. Another try would not help.
_REFUSALS = (
    "Invalid",
    "invalid",
    "not permitted",
    "violates",
    "exceed",
    "Requested node configuration",
    "Unrecognized",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """How this site asks Slurm for nodes."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: int = 72 * 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    exclusive: bool = False
    additional: Mapping[str, Any] = field(default_factory=dict[str, Any])


class SlurmScheduler:
    """Holds nodes of a Slurm cluster for one lineage."""

    grace_seconds = 30.0  # sbatch may be running when the daemon is killed

    def __init__(self, folder: Path, options: SlurmOptions, agent: Callable[[list[str]], None]) -> None:
        """`agent` runs on every held node, called with its command line."""
        self._folder = folder
        self._options = options
        self._agent = agent
        self._cached: dict[str, tuple[float, JobState]] = {}
        self._questions: dict[str, _Question[Any]] = {}
        self._submissions: dict[str, Future[str]] = {}

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job that runs one agent on each node. Returns its id.

        Raises:
            Refused: sbatch refused the job.
            NotYet: sbatch still runs; another call waits for the same one.
            SchedulerUnavailable: sbatch or srun failed.
        """
        wait = 0.0 if allocation in self._submissions else ANSWER_SECONDS
        if allocation not in self._submissions:
            self._submissions[allocation] = _in_thread(partial(self._submit, allocation, nodes, exclude))
        try:
            return self._submissions[allocation].result(wait)
        except TimeoutError as error:
            raise NotYet(f"sbatch has not answered in {ANSWER_SECONDS:g} s") from error

    def _submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        options = self._options
        try:
            executor = submitit.SlurmExecutor(self._folder / "slurm")
        except RuntimeError as error:
            raise SchedulerUnavailable(f"srun is not on the PATH: {error}", "load the Slurm environment") from error
        parameters = {
            "job_name": _JOB_NAME + allocation,
            "comment": self._comment(allocation),
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "time": options.time_minutes,
            "nodes": nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": options.cpus_per_task,
            "gpus_per_node": options.gpus_per_node,
            "exclude": ",".join(_known(exclude)) or None,
            "exclusive": options.exclusive or None,
            # The loss of a node must not end the job, or the step in which the agents run.
            "additional_parameters": {"no_kill": True, "no_requeue": True, **options.additional},
            "srun_args": ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"],
            # Agents get notice of the end and let their ranks save, even while no daemon runs.
            "signal_delay_s": NOTICE_SECONDS,
        }
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
        try:
            return executor.submit(self._agent, ["--folder", str(self._folder), "--allocation", allocation]).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            if any(word in str(error) for word in _REFUSALS):
                raise Refused(f"sbatch refused the job: {error}", "correct [slurm] in opt-ops.toml") from error
            raise SchedulerUnavailable(f"sbatch failed: {error}", "check slurmctld: scontrol ping") from error

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Return the queued and running jobs of this lineage. Their comment tells them from those of other folders."""
        return self._ask("jobs", self._jobs)

    def _jobs(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for number, line in enumerate(_ask("squeue", "-h", "--me", "-o", "%i|%j|%k")):
            if number and line.count("|") < 2:
                continue  # a further line of the comment above, which the user of that job wrote
            job, name, comment = _columns(line, 3)
            allocation = name.removeprefix(_JOB_NAME)
            if name.startswith(_JOB_NAME) and comment == self._comment(allocation):
                found.append((job, allocation))
        return found

    def state(self, job: str) -> JobState:
        """Return the state of a job. Slurm is asked at most every `POLL_SECONDS`."""
        asked, state = self._cached.get(job, (0.0, None))
        if state is None or time.monotonic() - asked >= POLL_SECONDS:
            state = self._ask(f"state {job}", partial(self._state, job))
            self._cached[job] = (time.monotonic(), state)
        return state

    def cancel(self, job: str) -> None:
        """Cancel a job."""
        self._ask(f"cancel {job}", partial(_ask, "scancel", job, may_fail=_NO_JOB))

    def drain(self, node: str, reason: str) -> None:
        """Drain a node. Only operators of the cluster may do that.

        Raises:
            Refused: this user may not, or Slurm does not know the node.
        """
        self._ask(f"drain {node}", partial(self._drain, node, reason))

    def _drain(self, node: str, reason: str) -> None:
        try:
            _ask("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")
        except SchedulerUnavailable as error:
            if "ermission" in str(error) or "Invalid user" in str(error):
                raise Refused(f"not permitted to drain {node}: {error}") from error
            if "Invalid node name" in str(error):
                raise Refused(f"Slurm does not know the node {node}: there is nothing to drain") from error
            raise

    def remove_node(self, job: str, node: str) -> None:
        """Remove a node from a job. Otherwise srun aborts the step on all nodes when the node's slurmd returns, in
        spite of --no-kill, because its step is missing there (seen with Slurm 22.05).

        Raises:
            Refused: the job needs this node.
        """
        self._ask(f"remove {node}", partial(self._remove_node, job, node))

    def _remove_node(self, job: str, node: str) -> None:
        held = [each for line in _ask("squeue", "-h", "-o", "%N", "-j", job) for each in _hosts(line)]
        others = [each for each in held if each != node]
        if not others or others == held:
            return
        try:
            _ask("scontrol", "update", f"jobid={job}", f"nodelist={','.join(others)}")
        except SchedulerUnavailable as error:
            if "Invalid node name" in str(error):  # it is the first node, where the job's script ran
                raise Refused(f"job {job} needs its node {node}: {error}") from error
            raise

    def _state(self, job: str) -> JobState:
        # `-t all` lists a job that has just ended. Minutes later slurmctld has forgotten it.
        lines, forgotten, ends_at = [], False, None
        try:
            lines = _ask("squeue", "-h", "-t", "all", "-o", "%i|%T|%N|%e|%r", "-j", job)
        except SchedulerUnavailable as error:
            forgotten = _NO_JOB in str(error)
            if not forgotten:
                raise
        if lines:
            _, word, nodes, ends, reason = _columns(lines[0], 5)
            ends_at = _time(ends)
        else:
            lines = _accounts(job)
            if not lines:
                if forgotten:
                    return JobState(AllocationStatus.ENDED, (), "FORGOTTEN")
                raise SchedulerUnavailable(f"neither squeue nor sacct knows job {job}")
            word, nodes, reason = _columns(lines[0], 3)
        word = (word.split() or [""])[0]  # sacct says "CANCELLED by 0"
        if word not in _QUEUED | _RUNNING | _ENDED:
            raise SchedulerUnavailable(f"Slurm reports {lines[0]!r} for job {job}, which is not a job state")
        if word in _QUEUED:
            return JobState(AllocationStatus.QUEUED, (), reason)
        if word not in _RUNNING:
            return JobState(AllocationStatus.ENDED, (), PREEMPTED if _preempted(job) else word)
        held = _hosts(nodes)
        if word == "COMPLETING":
            ends_at = None  # squeue then shows the time of the end, not the time limit
        near = ends_at is not None and ends_at - time.time() < PREEMPTION_CHECK_SECONDS
        return JobState(
            AllocationStatus.RUNNING, held, PREEMPTED if near and _preempted(job) else "", _unfit(nodes), ends_at
        )

    def _ask(self, what: str, ask: Callable[[], _T]) -> _T:
        """Ask a question, unless it is open. Returns the answer if it comes soon."""
        return self._questions.setdefault(what, _Question(ask)).answer()

    def _comment(self, allocation: str) -> str:
        return f"opt-ops {allocation} of {self._folder}"


class _Question(Generic[_T]):
    """A question to Slurm in a thread of its own, so that a slow answer does not delay a recovery."""

    def __init__(self, ask: Callable[[], _T]) -> None:
        self._ask = ask
        self._answer: Future[_T] | None = None
        self._answered_at = 0.0
        self._why = f"Slurm did not answer in {ANSWER_SECONDS:g} s"

    def answer(self) -> _T:
        """Return the answer to the open question; ask first if none is open.

        Raises:
            NotYet: there is no answer yet.
            SchedulerUnavailable: the command failed.
        """
        if self._answer is not None and self._answer.done() and time.monotonic() - self._answered_at > ANSWER_SECONDS:
            self._answer = None  # nobody took the answer while it was fresh
        wait = 0.0 if self._answer else ANSWER_SECONDS
        if self._answer is None:
            self._answer = _in_thread(self._run)
        try:
            answer = self._answer.result(wait)
        except TimeoutError as error:
            raise NotYet(self._why) from error
        except SchedulerUnavailable as error:
            self._why = str(error)  # repeated while the next question is open, so that it counts as nothing new
            raise
        finally:
            if self._answer is not None and self._answer.done():
                self._answer = None
        return answer

    def _run(self) -> _T:
        try:
            return self._ask()
        finally:
            self._answered_at = time.monotonic()


def _in_thread(call: Callable[[], _T]) -> Future[_T]:
    """Run a call in a daemon thread, which does not keep the process alive."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001  (raised again where the result is taken)
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _time(text: str) -> float | None:
    """Parse Slurm's local time; None for N/A, UNLIMITED and the like."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _preempted(job: str) -> bool:
    """Whether a job was preempted. A preempted job whose agents leave in its grace time ends as COMPLETED."""
    lines = _ask("squeue", "-h", "-t", "all", "-O", "PreemptTime", "-j", job, may_fail=_NO_JOB)
    return any(_time(line.strip()) is not None for line in lines)


def _accounts(job: str) -> list[str]:
    """Rows of accounting for a job that slurmctld has forgotten; none if the site has no accounting."""
    try:
        return _ask("sacct", "-n", "-P", "-X", "-o", "State,NodeList,Reason", "-j", job)
    except SchedulerUnavailable as error:
        if "disabled" in str(error) or "not on the PATH" in str(error):
            return []
        raise


def _known(nodes: Sequence[str]) -> list[str]:
    """The nodes that Slurm knows. It refuses a job that excludes an unknown node, and nodes do leave clusters."""
    if not nodes:
        return []
    there = set(_ask("sinfo", "-a", "-h", "-N", "-o", "%N"))
    return [node for node in nodes if node in there]


def _columns(line: str, number: int) -> list[str]:
    """Split a line into columns. The last one may contain the separator.

    Raises:
        SchedulerUnavailable: the line has too few columns, so it is not an answer.
    """
    columns = line.split("|", number - 1)
    if len(columns) < number:
        raise SchedulerUnavailable(f"Slurm reports {line!r}, which does not answer the question")
    return columns


def _hosts(nodes: str) -> tuple[str, ...]:
    return tuple(_ask("scontrol", "show", "hostnames", nodes))


def _unfit(nodes: str) -> dict[str, str]:
    """Nodes that are drained, failing or down, each with its state and the administrator's reason."""
    unfit: dict[str, str] = {}
    for line in _ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%N|%T|%E"):
        if line.count("|") < 2:
            continue  # a further line of the reason above, which an administrator wrote
        name, word, reason = _columns(line, 3)
        state = word.rstrip("*~#!%$@^-+").lower()
        if state.startswith(("drain", "down", "fail", "no_respond")) or word.endswith("*"):
            unfit[name] = f"slurm_{state}: {reason}"
    return unfit


def _ask(*command: str, may_fail: str = "") -> list[str]:
    """Run a Slurm command. Returns its lines; none if it fails with the message `may_fail`.

    Raises:
        SchedulerUnavailable: it failed with another message, or did not answer in time.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FORMATS)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise SchedulerUnavailable(f"{command[0]} is not on the PATH", "load the Slurm environment") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnavailable(f"{command[0]} did not answer in {TIMEOUT_SECONDS:g} s") from error
    if done.returncode != 0:
        if may_fail and may_fail in done.stderr:
            return []
        raise SchedulerUnavailable(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return [line for line in done.stdout.splitlines() if line]


def nodes_by_state(partition: str | None) -> dict[str, int]:
    """Count the nodes in each state, in one partition or in all."""
    only = ("-p", partition) if partition else ()
    counts: dict[str, int] = {}
    for line in _ask("sinfo", "-h", "-N", *only, "-o", "%N|%T"):
        state = line.partition("|")[2]
        counts[state] = counts.get(state, 0) + 1
    return counts
