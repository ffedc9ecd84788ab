"""The allocation and its nodes: what the scheduler says of the job, what the agents say of their nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from opt_ops.core.events import AllocationChanged, Event, NodeJudged, SignalRaised
from opt_ops.core.health import Heartbeat, Judgement, judge
from opt_ops.core.policy import Policy
from opt_ops.core.run import Node, State
from opt_ops.core.values import AllocationStatus, Tier, Verdict
from opt_ops.errors import SchedulerUnavailable
from opt_ops.ports import Agents, Clock, JobState, Scheduler
from opt_ops.watch.training import TrainingWatch


class AllocationWatch:
    """Asks the scheduler what becomes of our job."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.unfit: Mapping[str, str] = {}
        """Held nodes that the scheduler has drained or finds down, each with its reason."""

    def observe(self, state: State) -> Iterator[Event]:
        """An event when the answer is new. No answer is an event too, once, and changes nothing else."""
        allocation, attempt = state.allocation, state.attempt
        if allocation is None or allocation.job is None or not allocation.live:
            return
        try:
            job = self._scheduler.state(allocation.job)
        except SchedulerUnavailable as error:
            job = JobState(AllocationStatus.UNKNOWN, allocation.nodes, str(error), self.unfit)
        self.unfit = job.unfit
        seen = (allocation.status, allocation.nodes, allocation.reason)
        unknown = job.status is AllocationStatus.UNKNOWN
        if (job.reason == allocation.reason) if unknown else ((job.status, job.nodes, job.reason) == seen):
            return
        yield AllocationChanged(allocation=allocation.name, status=job.status, nodes=job.nodes, reason=job.reason)
        if job.status is AllocationStatus.ENDED and attempt is not None and attempt.live and not state.ended:
            yield SignalRaised(
                signal="allocation_lost",
                tier=Tier.ACT,
                attempt=attempt.name,
                step=attempt.last_step,
                onset_step=None,
                at=attempt.last_step_at or attempt.intended_at,
                rule="the scheduler says that the job has ended",
                evidence={"job": allocation.job, "reason": job.reason},
            )


class NodeWatch:
    """Judges the held nodes by their newest heartbeats, and notices which have fallen silent."""

    def __init__(
        self, policy: Policy, allocation: AllocationWatch, training: TrainingWatch, agents: Agents, clock: Clock
    ) -> None:
        self._policy = policy
        self._allocation = allocation
        self._training = training
        self._agents = agents
        self._clock = clock
        self._newest: dict[str, Heartbeat] = {}
        self._heard_at: dict[str, float] = {}

    def silent(self, node: str) -> bool:
        """Whether the node's agent has not been heard for too long, as far as this life can know."""
        return self.silence(node) > self._policy.silent_seconds

    def silence(self, node: str) -> float:
        """Seconds since the agent was heard, or since this life began to listen."""
        now = self._clock.monotonic()
        return now - self._heard_at.setdefault(node, now)

    def orders_seen(self, node: str) -> tuple[int, int]:
        """Epoch and sequence number of the orders that the node's agent last acted on."""
        heartbeat = self._newest.get(node)
        return heartbeat.orders if heartbeat else (0, 0)

    def observe(self, state: State) -> Iterator[Event]:
        """New verdicts, and signals for silent nodes on which the attempt runs."""
        for heartbeat in self._agents.heartbeats():
            self._newest[heartbeat.node] = heartbeat
            self._heard_at[heartbeat.node] = self._clock.monotonic()
        for name in state.allocation.nodes if state.allocation else ():
            node = state.nodes.get(name, Node(name=name))
            heartbeat = self._newest.get(name)
            if self.silent(name):
                yield from self._fell_silent(state, node)
            elif heartbeat is not None:
                judgement = self._judge(heartbeat)
                if (judgement.verdict, judgement.reason) != (node.verdict, node.reason):
                    yield from self._catch_up(state, name)
                    yield _judged(heartbeat, judgement)

    def _catch_up(self, state: State, node: str) -> Iterator[Event]:
        attempt = state.attempt
        if attempt is not None and attempt.live and node in attempt.nodes:
            yield from self._training.catch_up(attempt)

    def _judge(self, heartbeat: Heartbeat) -> Judgement:
        judgement = judge(heartbeat, self._policy.expected_gpus)
        why = self._allocation.unfit.get(heartbeat.node)
        if why is None or judgement.verdict is Verdict.BAD:
            return judgement
        source = "the scheduler: what runs there may go on, nothing new starts"
        return Judgement(verdict=Verdict.SUSPECT, reason=why, source=source)

    def _fell_silent(self, state: State, node: Node) -> Iterator[Event]:
        seconds = self.silence(node.name)
        if node.reason != "silent":
            yield NodeJudged(
                node=node.name,
                host=node.host,
                verdict=Verdict.UNKNOWN,
                reason="silent",
                source=f"no heartbeat for {self._policy.silent_seconds:g} s",
                at=self._clock.now() - seconds,
                evidence={"seconds": seconds},
            )
        attempt = state.attempt
        if attempt is None or not attempt.live or node.name not in attempt.nodes:
            return
        yield from self._training.catch_up(attempt)
        raised = SignalRaised(
            signal="silent_node",
            tier=Tier.ACT,
            attempt=attempt.name,
            step=attempt.last_step,
            onset_step=None,
            at=self._clock.now() - seconds,
            nodes=(node.name,),
            rule=f"no heartbeat for {self._policy.silent_seconds:g} s",
            evidence={"seconds": seconds},
        )
        if raised.key not in state.signals:
            yield raised


def _judged(heartbeat: Heartbeat, judgement: Judgement) -> NodeJudged:
    return NodeJudged(
        node=heartbeat.node,
        host=heartbeat.host,
        verdict=judgement.verdict,
        reason=judgement.reason,
        source=judgement.source,
        at=heartbeat.ts,
        evidence=judgement.evidence,
        drill=judgement.drill,
    )
