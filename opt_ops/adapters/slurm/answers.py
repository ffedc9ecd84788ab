"""What squeue, sacct and sinfo say of a job and of its nodes.

The controller outranks the accounts: what slurmctld does not know does not run, whatever the accounts still say. A
record of another job that had the same number is no answer about ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

from opt_ops.adapters.slurm.command import ask
from opt_ops.adapters.slurm.states import Job, job_state, unfit
from opt_ops.core.values import PREEMPTED, AllocationStatus
from opt_ops.errors import SchedulerUnavailable
from opt_ops.ports import JobState

PREEMPTION_CHECK_SECONDS = 600.0  # so long before the end of a job, ask whether a preemption brought it forward
FORGOTTEN = "FORGOTTEN"
"""Reason of the end of a job that slurmctld does not know, and whose end the accounts do not tell."""

NO_JOB = "Invalid job id"  # slurmctld does not know the job: it never existed, or it ended long ago
_CLOCKS_SECONDS = 120.0  # that the clocks of this host and of slurmctld may differ, for a record with our job's name
_ROUNDING_SECONDS = 2.0  # the same clock told the time twice; or a record has no name, and time alone must tell


@dataclass(frozen=True, slots=True, kw_only=True)
class OurJob:
    """A job of ours: its number, which Slurm may use again, and what tells it from others of that number."""

    number: str
    name: str = ""  # empty: not known
    since: float = 0.0  # it was submitted no earlier than this, seconds since the epoch


def state_of(job: OurJob, submitted: dict[str, float]) -> JobState:
    """The state of a job.

    Args:
        job: The job.
        submitted: When, by the controller's clock: `job.number` is filled in once the controller lists the job.

    Raises:
        SchedulerUnavailable: it is not known, or its word is not one that a table has.
    """
    lines, forgotten = [], False
    try:
        # `-t all` lists a job that has just ended. Minutes later slurmctld has forgotten it.
        lines = ask("squeue", "-h", "-t", "all", "-o", "%i|%T|%N|%e|%V|%j|%r", "-j", job.number)
    except SchedulerUnavailable as error:
        forgotten = NO_JOB in str(error)
        if not forgotten:
            raise
    if not lines:
        return _from_accounts(job, submitted.get(job.number), forgotten)
    line = next((line for line in lines if line.partition("|")[0].strip() == job.number), lines[0])
    number, word, nodes, ends, at, name, reason = columns(line, 7)
    known = job_state(word)
    if number.strip() != job.number or known is None:
        raise SchedulerUnavailable(f"Slurm reports {line!r} for job {job.number}, which is no state that opt-ops knows")
    if _is_of_another(job, name):
        return _from_accounts(job, submitted.get(job.number), forgotten=True)
    if (began := time_of(at)) is not None:
        submitted[job.number] = began
    return _state(job, known, nodes.strip(), time_of(ends), reason)


def _state(job: OurJob, known: tuple[Job, str], nodes: str, ends_at: float | None, reason: str) -> JobState:
    meaning, word = known
    if meaning is Job.MARK:
        meaning = Job.HOLDS if nodes else Job.QUEUED
    if meaning is Job.ENDED:
        return JobState(AllocationStatus.ENDED, (), PREEMPTED if _preempted(job.number) else word)
    if meaning is Job.QUEUED:
        booting = hosts(nodes) if nodes else ()
        return JobState(AllocationStatus.QUEUED, booting, reason if reason.strip() not in ("", "None") else word)
    held = hosts(nodes)
    if meaning is Job.SUSPENDED:  # its time limit rests, too
        return JobState(AllocationStatus.SUSPENDED, held, word)
    if meaning is Job.LEAVING:
        ends_at = None
    near = ends_at is not None and ends_at - time.time() < PREEMPTION_CHECK_SECONDS
    return JobState(
        AllocationStatus.RUNNING,
        held,
        PREEMPTED if near and _preempted(job.number) else "",
        _unfit_nodes(nodes),
        ends_at,
    )


def _from_accounts(job: OurJob, submitted: float | None, forgotten: bool) -> JobState:
    """What the accounts say of a job that the controller does not list. Only an end is believed."""
    try:
        lines = ask("sacct", "-n", "-P", "-X", "-o", "State,NodeList,Submit,JobName,Reason", "-j", job.number)
    except SchedulerUnavailable:
        if not forgotten:
            raise
        lines = []  # the site has no accounts, or their database does not answer: the controller is enough
    for line in lines:
        if line.count("|") < 4:
            continue
        word, _, at, name, _ = columns(line, 5)
        known = job_state(word)
        if known is None or known[0] is not Job.ENDED or _is_of_another(job, name):
            continue
        if not _is_older(job, name, time_of(at), submitted):
            return JobState(AllocationStatus.ENDED, (), known[1])
    if forgotten:
        return JobState(AllocationStatus.ENDED, (), FORGOTTEN)
    raise SchedulerUnavailable(f"squeue does not list job {job.number}, and sacct does not say that it has ended")


def _is_of_another(job: OurJob, name: str) -> bool:
    """Whether a record names another job, which had the number before or has it now."""
    return bool(job.name and name.strip() and name.strip() != job.name)


def _is_older(job: OurJob, name: str, at: float | None, submitted: float | None) -> bool:
    """Whether a record of the accounts is of an older job: the accounts lag, and still show that one for a while."""
    if at is None:
        return False
    if submitted is not None:
        return at < submitted - _ROUNDING_SECONDS
    return at < job.since - (_CLOCKS_SECONDS if name.strip() else _ROUNDING_SECONDS)


def _preempted(number: str) -> bool:
    """Whether a job was preempted. A preempted job whose agents leave in its grace time ends as COMPLETED."""
    try:
        lines = ask("squeue", "-h", "-t", "all", "-O", "PreemptTime", "-j", number)
    except SchedulerUnavailable:
        return False  # the state is known; a moment later it is asked again, unless the job has ended
    return any(time_of(line) is not None for line in lines)


def _unfit_nodes(nodes: str) -> dict[str, str]:
    """Nodes on which nothing new starts, each with its state and the administrator's reason."""
    found: dict[str, str] = {}
    for line in ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%N|%T|%E"):
        if line.count("|") < 2:
            continue  # a further line of the reason above, which an administrator wrote
        name, word, reason = columns(line, 3)
        if why := unfit(word, reason):
            found[name.strip()] = why
    return found


def time_of(text: str) -> float | None:
    """A time of Slurm, in seconds since the epoch; None for N/A, UNLIMITED and the like.

    It is asked for in that form. A Slurm that gives local time all the same is understood, but for the hour that a
    change of the clocks repeats: there it may be an hour early.
    """
    text = text.strip()
    try:
        at = (
            float(text)
            if text.isascii() and text.isdigit() and len(text) < 12
            else datetime.fromisoformat(text).timestamp()
        )
    except (ValueError, OverflowError, OSError):
        return None
    return at if at > 0 else None


def columns(line: str, number: int) -> list[str]:
    """Split a line into columns. The last one may contain the separator.

    Raises:
        SchedulerUnavailable: the line has too few columns, so it is not an answer.
    """
    found = line.split("|", number - 1)
    if len(found) < number:
        raise SchedulerUnavailable(f"Slurm reports {line!r}, which does not answer the question")
    return found


def hosts(nodes: str) -> tuple[str, ...]:
    """The names in a list such as n[1-3].

    Raises:
        SchedulerUnavailable: it is no such list.
    """
    names = tuple(ask("scontrol", "show", "hostnames", nodes)) if nodes else ()
    if not names:
        raise SchedulerUnavailable(f"Slurm reports {nodes!r} where the nodes of a job are meant")
    return names


def nodes_by_state(partition: str | None) -> dict[str, int]:
    """Count the nodes in each state, in one partition or in all."""
    only = ("-p", partition) if partition else ()
    counts: dict[str, int] = {}
    for line in ask("sinfo", "-h", "-N", *only, "-o", "%N|%T"):
        state = line.partition("|")[2]
        counts[state] = counts.get(state, 0) + 1
    return counts
