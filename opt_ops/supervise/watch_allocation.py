"""Watches the jobs of a lineage: what the scheduler reports, and which failure the end of a job is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from opt_ops.core.events import AllocationChanged, Event, SignalRaised, StrayFound
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Allocation, State
from opt_ops.core.values import HOLDING, PREEMPTED, AllocationStatus, Tier
from opt_ops.errors import NotYet, SchedulerUnavailable
from opt_ops.ports import Clock, JobState, Scheduler
from opt_ops.supervise.watch_training import TrainingWatch

_ORPHAN_CHECK_SECONDS = 30.0  # between two searches for jobs that no allocation accounts for

# A reason that changes while nothing else does: Slurm may give a waiting job another one at each look.
_REASON_SECONDS = 600.0

SUSPENDED_SECONDS = (
    600.0  # of a suspended job before on-call is notified; time slices of gang scheduling take half a minute
)

# How the scheduler says that a job ended → its failure class. Any other end is `allocation_lost`.
SIGNAL_OF_END = {
    "TIMEOUT": FailureClass.TIME_LIMIT,
    PREEMPTED: FailureClass.PREEMPTION,
    "CANCELLED": FailureClass.JOB_CANCELLED,
}


class AllocationWatch:
    """Asks the scheduler for the state of each job."""

    def __init__(self, scheduler: Scheduler, training: TrainingWatch, clock: Clock) -> None:
        self._training = training
        self._scheduler = scheduler
        self._clock = clock
        self._orphans_checked_at = clock.monotonic() - _ORPHAN_CHECK_SECONDS
        self._told_at: dict[str, float] = {}
        """By allocation: when its change was last journaled."""
        self.unfit: dict[str, str] = {}
        """Held nodes that are drained or down in the scheduler, each with the scheduler's reason."""

    def observe(self, state: State) -> Iterator[Event]:
        """Yield an event for each new answer. No answer is one event, and the last known state stays in force."""
        known, self.unfit = self.unfit, {}
        for allocation in state.live_allocations:
            if allocation.job is not None:
                yield from self._allocation(state, allocation, allocation.job, known)
        yield from self._orphan_jobs(state)

    def _allocation(
        self, state: State, allocation: Allocation, job_id: str, known: Mapping[str, str]
    ) -> Iterator[Event]:
        try:
            job = self._scheduler.state(job_id, allocation.name, allocation.intended_at)
            job = _as_known(job, allocation)
        except SchedulerUnavailable as error:
            unfit = {node: known[node] for node in allocation.nodes if node in known}
            self.unfit |= unfit
            if isinstance(error, NotYet):
                return  # it was asked for the first time just now
            job = JobState(AllocationStatus.UNKNOWN, allocation.nodes, str(error), unfit)
        self.unfit |= job.unfit
        if job.status is AllocationStatus.SUSPENDED:
            yield from self._suspended(state, allocation, job_id)
        if not self._is_news(job, allocation):
            return
        self._told_at[allocation.name] = self._clock.monotonic()
        if job.status in (AllocationStatus.ENDED, AllocationStatus.QUEUED):
            yield from self._lost(state, allocation, job_id, job)
        yield AllocationChanged(
            allocation=allocation.name, status=job.status, nodes=job.nodes, reason=job.reason, ends_at=job.ends_at
        )

    def _is_news(self, job: JobState, allocation: Allocation) -> bool:
        """Whether to journal what the scheduler says. Of a reason that alone has changed: a new kind, now and then."""
        unknown = job.status is AllocationStatus.UNKNOWN
        if unknown != (allocation.unknown_since is not None):
            return True
        seen = (allocation.status, allocation.nodes, allocation.ends_at)
        if not unknown and (job.status, job.nodes, job.ends_at) != seen:
            return True
        if job.status not in (AllocationStatus.UNKNOWN, AllocationStatus.QUEUED):
            return job.reason != allocation.reason
        told = self._told_at.get(allocation.name)
        due = told is None or self._clock.monotonic() - told >= _REASON_SECONDS
        return due and _kind_of(job.reason) != _kind_of(allocation.reason)

    def _lost(self, state: State, allocation: Allocation, job_id: str, job: JobState) -> Iterator[Event]:
        """Yield a signal if the attempt runs in the job that has ended, or that waits for nodes again."""
        attempt = state.attempt
        if attempt is None or not attempt.live or state.ended or not _holds_nodes_of(state, attempt, allocation):
            return
        ended, last = job.status is AllocationStatus.ENDED, self._training.last(attempt)
        yield from self._training.report_progress(attempt)
        raised = SignalRaised(
            generation=attempt.generation,
            signal=SIGNAL_OF_END.get(job.reason.split()[0] if job.reason else "", FailureClass.ALLOCATION_LOST),
            tier=Tier.ACT,
            attempt=attempt.name,
            step=last.step if last else attempt.last_step,
            onset_step=None,
            at=last.ts if last else attempt.last_step_at or attempt.intended_at,
            rule=f"the scheduler reports that the job {'has ended' if ended else 'waits for nodes again'}",
            evidence={"job": job_id, "reason": job.reason},
        )
        if raised.key not in state.signals:
            yield raised  # before the change: once that is journaled, the end is not new any more

    def _suspended(self, state: State, allocation: Allocation, job_id: str) -> Iterator[Event]:
        """Yield a signal if the attempt's job is suspended for long."""
        attempt, seconds = state.attempt, self._clock.now() - allocation.since
        if attempt is None or not attempt.live or not allocation.suspended or seconds < SUSPENDED_SECONDS:
            return
        if state.ended or not _holds_nodes_of(state, attempt, allocation):
            return
        last = self._training.last(attempt)
        step = last.step if last else attempt.last_step
        raised = SignalRaised(
            generation=attempt.generation,
            signal=FailureClass.SUSPENDED,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=step,
            onset_step=step,
            at=allocation.since,
            rule=f"the scheduler has suspended the job for {SUSPENDED_SECONDS / 60:g} minutes",
            evidence={"job": job_id, "seconds": seconds},
        )
        if raised.key not in state.signals:
            yield raised

    def _orphan_jobs(self, state: State) -> Iterator[Event]:
        """Report jobs of a submission that was given up, and second jobs of one submission: both hold nodes."""
        if not state.allocations or self._clock.monotonic() - self._orphans_checked_at < _ORPHAN_CHECK_SECONDS:
            return
        try:
            jobs = self._scheduler.jobs()
        except SchedulerUnavailable:
            return
        self._orphans_checked_at = self._clock.monotonic()
        for job, name in jobs:
            allocation = state.allocations.get(name)
            expected = allocation is not None and allocation.live and allocation.job in (None, job)
            if not expected and job not in state.orphan_jobs:
                yield StrayFound(job=job, allocation=name)


def _holds_nodes_of(state: State, attempt: Attempt, allocation: Allocation) -> bool:
    """Whether the allocation holds a node of the attempt. A released allocation may still list the same nodes."""
    holders = (state.held.get(node) for node in attempt.nodes)
    return any(holder is not None and holder.name == allocation.name for holder in holders)


def _as_known(job: JobState, allocation: Allocation) -> JobState:
    """The answer in the light of what is known: nodes of a waiting job are none yet, unless they are held already.

    Slurm may configure the nodes of a running job again: the job waits for them, but it keeps them.
    """
    if job.status is not AllocationStatus.QUEUED:
        return job
    keeps = allocation.status in HOLDING and bool(job.nodes) and set(job.nodes) >= set(allocation.nodes)
    if keeps:
        return replace(job, status=allocation.status, reason=allocation.reason, ends_at=allocation.ends_at)
    return replace(job, nodes=())


def _kind_of(reason: str) -> str:
    """The kind of a reason: "ReqNodeNotAvail, UnavailableNodes:n[1-2]" is one, whichever nodes it names."""
    return re.split(r"[,(]", reason, maxsplit=1)[0].strip()
