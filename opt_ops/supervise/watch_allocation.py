"""Watches the jobs of a lineage: what the scheduler reports, and which failure the end of a job is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from opt_ops.core.events import AllocationChanged, Event, SignalRaised, StrayFound
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.model import Allocation, Attempt, State
from opt_ops.core.values import PREEMPTED, AllocationStatus, Tier
from opt_ops.errors import SchedulerUnavailable
from opt_ops.ports import Clock, JobState, Scheduler
from opt_ops.supervise.watch_training import TrainingWatch

_ORPHAN_CHECK_SECONDS = 30.0  # between two searches for jobs that no allocation accounts for

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
            job = self._scheduler.state(job_id)
        except SchedulerUnavailable as error:
            unfit = {node: known[node] for node in allocation.nodes if node in known}
            job = JobState(AllocationStatus.UNKNOWN, allocation.nodes, str(error), unfit)
        self.unfit |= job.unfit
        seen = (allocation.status, allocation.nodes, allocation.reason, allocation.ends_at)
        unknown = job.status is AllocationStatus.UNKNOWN
        same = (job.status, job.nodes, job.reason, job.ends_at) == seen
        if (job.reason == allocation.reason) if unknown else same:
            return
        attempt = state.attempt
        lost = job.status is AllocationStatus.ENDED and attempt is not None and attempt.live and not state.ended
        if lost and attempt is not None and _holds_nodes_of(state, attempt, allocation):
            last = self._training.last(attempt)
            yield from self._training.report_progress(attempt)
            raised = SignalRaised(
                signal=SIGNAL_OF_END.get(job.reason.split()[0] if job.reason else "", FailureClass.ALLOCATION_LOST),
                tier=Tier.ACT,
                attempt=attempt.name,
                step=last.step if last else attempt.last_step,
                onset_step=None,
                at=last.ts if last else attempt.last_step_at or attempt.intended_at,
                rule="the scheduler reports that the job has ended",
                evidence={"job": job_id, "reason": job.reason},
            )
            if raised.key not in state.signals:
                yield raised  # before the change: once that is journaled, the end is not new any more
        yield AllocationChanged(
            allocation=allocation.name, status=job.status, nodes=job.nodes, reason=job.reason, ends_at=job.ends_at
        )

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
