"""Slurm: submitit submits one job that holds the nodes and runs an agent on each; squeue, sacct, sinfo tell the rest.

Only text with explicit columns is read: Slurm's JSON changes between releases. A command that fails or does not answer
means *unknown*, never gone. Nobody but the supervisor restarts anything: no requeue by Slurm, none by submitit.
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

POLL_SECONDS = 5.0  # slurmctld has others to serve
TIMEOUT_SECONDS = 20.0
PATIENCE_SECONDS = 2.0  # that a tick waits for an answer; a later tick takes it
WARNING_SECONDS = 120  # before the time limit
GRACE_SECONDS = 600.0  # before a job's end, it is worth asking whether a preemption has brought it forward

_QUEUED = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
_ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
    }
)

# What users set for their own eyes changes the columns that we read.
_FORMATS = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS")

_NO_JOB = "Invalid job id"  # the controller's word for a job that it does not know: never was, or is long over

# sbatch's words for a job that can never be: asking again is of no use.
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
    """How to ask for nodes here."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: int = 72 * 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    exclusive: bool = False
    additional: Mapping[str, Any] = field(default_factory=dict[str, Any])


class SlurmScheduler:
    """Holds nodes for one lineage."""

    grace_seconds = 30.0  # sbatch may be under way when the daemon is killed

    def __init__(self, folder: Path, options: SlurmOptions, agent: Callable[[list[str]], None]) -> None:
        """`agent` is what every held node runs, given its command line."""
        self._folder = folder
        self._options = options
        self._agent = agent
        self._cached: dict[str, tuple[float, JobState]] = {}
        self._questions: dict[str, _Question[Any]] = {}
        self._submissions: dict[str, Future[str]] = {}

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job that runs one agent a node; its id."""
        patience = 0.0 if allocation in self._submissions else PATIENCE_SECONDS
        if allocation not in self._submissions:
            self._submissions[allocation] = _in_thread(partial(self._submit, allocation, nodes, exclude))
        try:
            return self._submissions[allocation].result(patience)
        except TimeoutError as error:
            raise NotYet(f"sbatch has not answered in {PATIENCE_SECONDS:g} s") from error

    def _submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        options = self._options
        try:
            executor = submitit.SlurmExecutor(self._folder / "slurm")
        except RuntimeError as error:
            raise SchedulerUnavailable(f"srun is not on the PATH: {error}", "load Slurm's environment") from error
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
            # One node less is no reason to end the job or the step that the agents are.
            "additional_parameters": {"no_kill": True, "no_requeue": True, **options.additional},
            "srun_args": ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"],
            # The agents hear of the end before it comes and have their ranks save, even while no daemon lives.
            "signal_delay_s": WARNING_SECONDS,
        }
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
        try:
            return executor.submit(self._agent, ["--folder", str(self._folder), "--allocation", allocation]).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            if any(word in str(error) for word in _REFUSALS):
                raise Refused(f"sbatch refused the job: {error}", "correct [slurm] in opt-ops.toml") from error
            raise SchedulerUnavailable(f"sbatch failed: {error}", "is slurmctld up? try: scontrol ping") from error

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Our jobs that are queued or run, told by their comment: another lineage may have the same number."""
        return self._ask("jobs", self._jobs)

    def _jobs(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for number, line in enumerate(_ask("squeue", "-h", "--me", "-o", "%i|%j|%k")):
            if number and line.count("|") < 2:
                continue  # more of the comment above, which is whatever the user of that job wrote
            job, name, comment = _columns(line, 3)
            allocation = name.removeprefix(_JOB_NAME)
            if name.startswith(_JOB_NAME) and comment == self._comment(allocation):
                found.append((job, allocation))
        return found

    def state(self, job: str) -> JobState:
        """What becomes of the job; not asked more often than every few seconds."""
        asked, state = self._cached.get(job, (0.0, None))
        if state is None or time.monotonic() - asked >= POLL_SECONDS:
            state = self._ask(f"state {job}", partial(self._state, job))
            self._cached[job] = (time.monotonic(), state)
        return state

    def cancel(self, job: str) -> None:
        """End the job."""
        self._ask(f"cancel {job}", partial(_ask, "scancel", job, may_fail=_NO_JOB))

    def drain(self, node: str, reason: str) -> None:
        """Drain the node; only operators of the cluster may."""
        self._ask(f"drain {node}", partial(self._drain, node, reason))

    def _drain(self, node: str, reason: str) -> None:
        try:
            _ask("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")
        except SchedulerUnavailable as error:
            if "ermission" in str(error) or "Invalid user" in str(error):
                raise Refused(f"not permitted to drain {node}: {error}") from error
            if "Invalid node name" in str(error):
                raise Refused(f"Slurm knows no node {node}: there is nothing to drain") from error
            raise

    def remove_node(self, job: str, node: str) -> None:
        """Take a node out of the job. Else srun, when the node's slurmd comes back, finds its step gone there and
        aborts it on all nodes, in spite of --no-kill (seen with Slurm 22.05).
        """
        self._ask(f"let {node} go", partial(self._remove_node, job, node))

    def _remove_node(self, job: str, node: str) -> None:
        held = [each for line in _ask("squeue", "-h", "-o", "%N", "-j", job) for each in _hosts(line)]
        staying = [each for each in held if each != node]
        if not staying or staying == held:
            return
        try:
            _ask("scontrol", "update", f"jobid={job}", f"nodelist={','.join(staying)}")
        except SchedulerUnavailable as error:
            if "Invalid node name" in str(error):  # the first node, where the job's script ran
                raise Refused(f"job {job} cannot do without {node}: {error}") from error
            raise

    def _state(self, job: str) -> JobState:
        # `-t all`: a job that has just ended is still listed, minutes later the controller has forgotten it.
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
            if not lines and forgotten:
                return JobState(AllocationStatus.ENDED, (), "FORGOTTEN")
            if not lines:
                raise SchedulerUnavailable(f"neither squeue nor sacct says anything of job {job}")
            word, nodes, reason = _columns(lines[0], 3)
        word = (word.split() or [""])[0]  # sacct says "CANCELLED by 0"
        if word not in _QUEUED | _RUNNING | _ENDED:
            raise SchedulerUnavailable(f"Slurm says {lines[0]!r} of job {job}, which is no state of a job")
        if word in _QUEUED:
            return JobState(AllocationStatus.QUEUED, (), reason)
        if word not in _RUNNING:
            return JobState(AllocationStatus.ENDED, (), PREEMPTED if _preempted(job) else word)
        held = _hosts(nodes)
        if word == "COMPLETING":
            ends_at = None  # squeue's time is that of its end then, whatever ended it: no time limit
        near = ends_at is not None and ends_at - time.time() < GRACE_SECONDS
        return JobState(
            AllocationStatus.RUNNING, held, PREEMPTED if near and _preempted(job) else "", _unfit(nodes), ends_at
        )

    def _ask(self, what: str, ask: Callable[[], _T]) -> _T:
        """Put a question that is not put yet; its answer, if that comes soon."""
        return self._questions.setdefault(what, _Question(ask)).answer()

    def _comment(self, allocation: str) -> str:
        return f"opt-ops {allocation} of {self._folder}"


class _Question(Generic[_T]):
    """Put to Slurm in a thread of its own: whoever does not answer must not hold up a recovery that needs no answer."""

    def __init__(self, ask: Callable[[], _T]) -> None:
        self._ask = ask
        self._answer: Future[_T] | None = None
        self._answered_at = 0.0
        self._why = f"Slurm did not answer in {PATIENCE_SECONDS:g} s"

    def answer(self) -> _T:
        """The answer to a question put now, or to one still open.

        Raises:
            SchedulerUnavailable: there is none yet, or the command failed.
        """
        if self._answer is not None and self._answer.done() and time.monotonic() - self._answered_at > PATIENCE_SECONDS:
            self._answer = None  # nobody took it while it was true
        patience = 0.0 if self._answer else PATIENCE_SECONDS
        if self._answer is None:
            self._answer = _in_thread(self._put)
        try:
            answer = self._answer.result(patience)
        except TimeoutError as error:
            raise NotYet(self._why) from error
        except SchedulerUnavailable as error:
            self._why = str(error)  # said again while the next one is open: nothing new
            raise
        finally:
            if self._answer is not None and self._answer.done():
                self._answer = None
        return answer

    def _put(self) -> _T:
        try:
            return self._ask()
        finally:
            self._answered_at = time.monotonic()


def _in_thread(call: Callable[[], _T]) -> Future[_T]:
    """Call it in a thread that keeps no process alive."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001  (it is raised where the result is taken)
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _time(text: str) -> float | None:
    """Slurm's local time; None for N/A, UNLIMITED and the like."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _preempted(job: str) -> bool:
    """Whether somebody more important took the nodes. A job whose agents leave within its grace time ends COMPLETED."""
    lines = _ask("squeue", "-h", "-t", "all", "-O", "PreemptTime", "-j", job, may_fail=_NO_JOB)
    return any(_time(line.strip()) is not None for line in lines)


def _accounts(job: str) -> list[str]:
    """What accounting has of a job that the controller does not know any more; nothing where there is no accounting."""
    try:
        return _ask("sacct", "-n", "-P", "-X", "-o", "State,NodeList,Reason", "-j", job)
    except SchedulerUnavailable as error:
        if "disabled" in str(error) or "not on the PATH" in str(error):
            return []
        raise


def _known(nodes: Sequence[str]) -> list[str]:
    """Those that Slurm knows: it refuses every job that excludes another, and machines do leave clusters."""
    if not nodes:
        return []
    there = set(_ask("sinfo", "-a", "-h", "-N", "-o", "%N"))
    return [node for node in nodes if node in there]


def _columns(line: str, number: int) -> list[str]:
    """The columns of a line; the last one may be anything.

    Raises:
        SchedulerUnavailable: it has fewer, so that it is no answer.
    """
    columns = line.split("|", number - 1)
    if len(columns) < number:
        raise SchedulerUnavailable(f"Slurm says {line!r}, which is not the answer to what was asked")
    return columns


def _hosts(nodes: str) -> tuple[str, ...]:
    return tuple(_ask("scontrol", "show", "hostnames", nodes))


def _unfit(nodes: str) -> dict[str, str]:
    """Held nodes that are drained, failing or down, each with its state and the administrator's reason."""
    unfit: dict[str, str] = {}
    for line in _ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%N|%T|%E"):
        if line.count("|") < 2:
            continue  # more of the reason above, which is whatever an administrator wrote
        name, word, reason = _columns(line, 3)
        state = word.rstrip("*~#!%$@^-+").lower()
        if state.startswith(("drain", "down", "fail", "no_respond")) or word.endswith("*"):
            unfit[name] = f"slurm_{state}: {reason}"
    return unfit


def _ask(*command: str, may_fail: str = "") -> list[str]:
    """Run a Slurm command; its lines.

    Raises:
        SchedulerUnavailable: it failed or did not answer in time. `may_fail`: unless it complains of just this, which
            then is the answer "no lines".
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
        raise SchedulerUnavailable(f"{command[0]} is not on the PATH", "load Slurm's environment") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnavailable(f"{command[0]} did not answer in {TIMEOUT_SECONDS:g} s") from error
    if done.returncode != 0:
        if may_fail and may_fail in done.stderr:
            return []
        raise SchedulerUnavailable(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return [line for line in done.stdout.splitlines() if line]


def nodes_by_state(partition: str | None) -> dict[str, int]:
    """How many nodes are in each state, in one partition or in all."""
    only = ("-p", partition) if partition else ()
    counts: dict[str, int] = {}
    for line in _ask("sinfo", "-h", "-N", *only, "-o", "%N|%T"):
        state = line.partition("|")[2]
        counts[state] = counts.get(state, 0) + 1
    return counts
