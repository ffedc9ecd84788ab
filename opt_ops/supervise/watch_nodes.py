"""The allocation and its nodes: what the scheduler says of the job, what the agents say of their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from opt_ops.core.decide.policy import Policy
from opt_ops.core.events import AllocationChanged, Event, NodeJudged, SignalRaised, StrayFound
from opt_ops.core.health import Heartbeat, History, Judgement, differing, judge, remember, same_readings
from opt_ops.core.health.energy import EnergyMeter
from opt_ops.core.health.silence import SPREAD_SECONDS, Silence
from opt_ops.core.state.model import Allocation, Attempt, Node, State
from opt_ops.core.values import PREEMPTED, AllocationStatus, GpuPart, Tier, Verdict
from opt_ops.errors import SchedulerUnavailable
from opt_ops.ports import Agents, Clock, JobState, Scheduler
from opt_ops.supervise.watch_training import TrainingWatch

WORD_SECONDS = 20.0  # a scheduler that ends a job ends its processes first, and says later that it did, and why
_COMPARE_SECONDS = 30.0  # between looks for nodes that are not like the others
_DRIFT_SECONDS = 3600.0  # and at most, when no node has said anything new
_COUNT_SECONDS = 30.0  # between looks for jobs that nobody accounts for

# The scheduler's word for how a job ended, where it names a failure class of its own.
_SIGNAL_OF_END = {"TIMEOUT": "time_limit", PREEMPTED: "preemption", "CANCELLED": "job_cancelled"}


class AllocationWatch:
    """Asks the scheduler what becomes of our jobs."""

    def __init__(self, scheduler: Scheduler, training: TrainingWatch, clock: Clock) -> None:
        self._training = training
        self._scheduler = scheduler
        self._clock = clock
        self._counted_at = clock.monotonic() - _COUNT_SECONDS
        self.unfit: dict[str, str] = {}
        """Held nodes that the scheduler has drained or finds down, each with its reason."""

    def observe(self, state: State) -> Iterator[Event]:
        """An event when an answer is new. No answer is an event too, once, and changes nothing else."""
        self.unfit = {}
        for allocation in state.live_allocations:
            if allocation.job is not None:
                yield from self._allocation(state, allocation, allocation.job)
        yield from self._strays(state)

    def _allocation(self, state: State, allocation: Allocation, job_id: str) -> Iterator[Event]:
        try:
            job = self._scheduler.state(job_id)
        except SchedulerUnavailable as error:
            job = JobState(AllocationStatus.UNKNOWN, allocation.nodes, str(error))
        self.unfit |= job.unfit
        seen = (allocation.status, allocation.nodes, allocation.reason, allocation.ends_at)
        unknown = job.status is AllocationStatus.UNKNOWN
        same = (job.status, job.nodes, job.reason, job.ends_at) == seen
        if (job.reason == allocation.reason) if unknown else same:
            return
        attempt = state.attempt
        lost = job.status is AllocationStatus.ENDED and attempt is not None and attempt.live and not state.ended
        if lost and attempt is not None and _runs_through(state, attempt, allocation):
            last = self._training.last(attempt)
            yield from self._training.catch_up(attempt)
            raised = SignalRaised(
                signal=_SIGNAL_OF_END.get(job.reason.split()[0] if job.reason else "", "allocation_lost"),
                tier=Tier.ACT,
                attempt=attempt.name,
                step=last.step if last else attempt.last_step,
                onset_step=None,
                at=last.ts if last else attempt.last_step_at or attempt.intended_at,
                rule="the scheduler says that the job has ended",
                evidence={"job": job_id, "reason": job.reason},
            )
            if raised.key not in state.signals:
                yield raised  # first: once the change is journaled, the end is not news any more
        yield AllocationChanged(
            allocation=allocation.name, status=job.status, nodes=job.nodes, reason=job.reason, ends_at=job.ends_at
        )

    def _strays(self, state: State) -> Iterator[Event]:
        """A job that came of a try which was given up, or twice of one, must not hold nodes unseen."""
        if not state.allocations or self._clock.monotonic() - self._counted_at < _COUNT_SECONDS:
            return
        try:
            jobs = self._scheduler.jobs()
        except SchedulerUnavailable:
            return
        self._counted_at = self._clock.monotonic()
        for job, name in jobs:
            allocation = state.allocations.get(name)
            expected = allocation is not None and allocation.live and allocation.job in (None, job)
            if not expected and job not in state.strays:
                yield StrayFound(job=job, allocation=name)


class NodeWatch:
    """Judges the held nodes by their newest heartbeats, and notices which have fallen silent."""

    def __init__(
        self,
        policy: Policy,
        allocation: AllocationWatch,
        training: TrainingWatch,
        agents: Agents,
        clock: Clock,
        histories: Mapping[str, History] | None = None,
    ) -> None:
        """`histories`: what an earlier life has found of nodes."""
        self._policy = policy
        self._allocation = allocation
        self._training = training
        self._agents = agents
        self._clock = clock
        self._newest: dict[str, Heartbeat] = {}
        self._silence = Silence(policy.silent_seconds)
        self._steady: dict[str, set[bool]] = {}
        """For each node whether its history would stay as it is by the same readings again: idle, and with ranks."""
        self._looked_at: dict[str, Node] = {}
        """The nodes about which nothing is new since they were judged as the state says."""
        self._bad_parts: Mapping[str, str] = {}
        self._around: tuple[Mapping[str, object], ...] = ({}, {})
        self._news = False
        self._histories: dict[str, History] = dict(histories or {})
        self._differing: Mapping[str, Judgement] = {}
        self._compared_at = clock.monotonic()
        self._energy = EnergyMeter()

    def lost(self, node: str) -> bool:
        """Whether the node is silent by its own fault, as far as this life can know."""
        return self._silence.lost(node)

    def all_heard(self, nodes: Iterable[str], seconds: float) -> bool:
        """Whether a heartbeat of each of these nodes was read within that time."""
        now = self._clock.monotonic()
        heard = [at for node in nodes if (at := self._silence.heard_at(node)) is not None]
        return all(now - at <= seconds for at in heard)

    def orders_seen(self, node: str) -> tuple[int, int]:
        """Epoch and sequence number of the orders that the node's agent last acted on."""
        heartbeat = self._newest.get(node)
        return heartbeat.orders if heartbeat else (0, 0)

    def warned(self, node: str) -> bool:
        """Whether the scheduler has told the node's agent that its job ends."""
        heartbeat = self._newest.get(node)
        return heartbeat is not None and heartbeat.warned

    def observe(self, state: State) -> Iterator[Event]:
        """New verdicts, and signals for silent nodes on which the attempt runs."""
        held, now = state.held, self._clock.monotonic()
        heard: set[str] = set()
        for heartbeat in self._agents.heartbeats():
            holder = held.get(heartbeat.node)
            if holder is None or heartbeat.allocation in (None, holder.name):
                self._hear(heartbeat)
                if holder is not None:
                    heard.add(heartbeat.node)
                    self._energy.hear(heartbeat)
        self._silence.look(now, heard, held.keys())
        if metered := self._energy.account(state.ended):
            yield metered
        self._compare(held, now)
        self._look_around(state)
        attempt = state.attempt
        if attempt is not None and attempt.live and any(map(self.lost, attempt.nodes)):
            yield from self._training.observe(state)  # steps that came while the daemon was held up are read first
        for name in held:
            if self._silence.silent(name):
                yield from self._fell_silent(state, state.nodes.get(name, Node(name=name)))
            elif name not in self._looked_at or self._looked_at[name] is not state.nodes.get(name):
                yield from self._look(state, name)

    def _look_around(self, state: State) -> None:
        """Look anew at nodes of which somebody else has said something new."""
        if self._bad_parts != state.bad_parts:
            self._bad_parts = state.bad_parts
            self._looked_at.clear()
        before, self._around = self._around, (self._allocation.unfit, self._differing)
        for old, new in zip(before, self._around, strict=True):
            for name in old.keys() | new.keys() if old != new else ():
                if old.get(name) != new.get(name):
                    self._looked_at.pop(name, None)

    def _hear(self, heartbeat: Heartbeat) -> None:
        name = heartbeat.node
        before = self._newest.get(name)
        self._newest[name] = heartbeat
        same, idle = before is not None and same_readings(before, heartbeat), heartbeat.attempt is None
        if same and idle in self._steady.get(name, ()):
            return  # as nearly every heartbeat
        history, steady = self._histories.get(name, History()), self._steady.setdefault(name, set())
        if not same:
            steady.clear()
        after = remember(history, heartbeat, self._policy.expected_gpus)
        if after.counts or after.streaks:
            steady.clear()
        if not after.counts and (after == history if same else not after.streaks):
            steady.add(idle)
        self._histories[name] = after
        self._looked_at.pop(name, None)
        self._news = True

    def _compare(self, held: Mapping[str, Allocation], now: float) -> None:
        """Hold the nodes beside each other; clocks that drift apart are noticed even when nothing else is new."""
        waited = now - self._compared_at
        if waited < _COMPARE_SECONDS or not (self._news or waited >= _DRIFT_SECONDS):
            return
        self._compared_at, self._news = now, False
        heard = (name for name in held if name in self._newest and self._silence.seconds(name) <= SPREAD_SECONDS)
        self._differing = differing([self._newest[name] for name in heard])

    def _look(self, state: State, name: str) -> Iterator[Event]:
        """Judge a node about which something is new."""
        heartbeat, known = self._newest.get(name), state.nodes.get(name)
        if heartbeat is None:
            return
        node = known or Node(name=name)
        judgement = self._judge(state, node, heartbeat)
        gpus = _parts(heartbeat)
        news = () if gpus == node.gpus else gpus
        if (judgement.verdict, judgement.reason) != (node.verdict, node.reason) or news:
            yield from self._catch_up(state, name)
            yield _judged(heartbeat, judgement, news)
        elif known is not None:
            self._looked_at[name] = known

    def _catch_up(self, state: State, node: str) -> Iterator[Event]:
        attempt = state.attempt
        if attempt is not None and attempt.live and node in attempt.nodes:
            yield from self._training.catch_up(attempt)

    def _judge(self, state: State, node: Node, heartbeat: Heartbeat) -> Judgement:
        """The node's verdict: by its readings, by what its parts did here before, by the scheduler, by its peers."""
        xids = tuple(xid for xid in heartbeat.xids if xid.at > node.allowed_at)
        burn_in = heartbeat.burn_in if heartbeat.burned_at > node.allowed_at else None
        since = replace(heartbeat, xids=xids, burn_in=burn_in)
        judgement = judge(since, self._policy.expected_gpus, self._histories.get(node.name))
        if judgement.verdict is Verdict.BAD:
            return judgement
        for gpu in heartbeat.gpus:
            if gpu.uuid is not None and gpu.uuid in state.bad_parts:
                evidence = {"uuid": gpu.uuid, "serial": gpu.serial, "was_in": state.bad_parts[gpu.uuid]}
                source = "this lineage's own record: it failed here before, and nobody has allowed it again"
                return Judgement(verdict=Verdict.BAD, reason="known_bad_gpu", source=source, evidence=evidence)
        why = self._allocation.unfit.get(heartbeat.node)
        if why is None:
            odd = self._differing.get(node.name, judgement)
            stale = odd.reason.startswith("burn_in_") and burn_in is None
            return odd if judgement.reason == "ok" and not stale else judgement
        source = "the scheduler: what runs there may go on, nothing new starts"
        return Judgement(verdict=Verdict.SUSPECT, reason=why, source=source)

    def _fell_silent(self, state: State, node: Node) -> Iterator[Event]:
        seconds = self._silence.seconds(node.name)
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
        if attempt is None or not attempt.live or node.name not in attempt.nodes or not self.lost(node.name):
            return
        if self.warned(node.name) and seconds < self._policy.silent_seconds + WORD_SECONDS:
            return  # its job was to end: the scheduler will say so, and why
        if self._training.idle_seconds(attempt) < self._policy.silent_seconds:
            return  # ranks on every node are needed for a step: while steps come, the node lives
        yield from self._training.catch_up(attempt)
        raised = SignalRaised(
            signal="silent_node",
            tier=Tier.ACT,
            attempt=attempt.name,
            step=attempt.last_step,
            onset_step=None,
            at=self._clock.now() - seconds,
            nodes=(node.name,),
            rule=f"no heartbeat for {self._policy.silent_seconds:g} s, and no step",
            evidence={"seconds": seconds},
        )
        if raised.key not in state.signals:
            yield raised


def _parts(heartbeat: Heartbeat) -> tuple[GpuPart, ...]:
    return tuple(
        GpuPart(uuid=gpu.uuid, serial=gpu.serial, name=gpu.name) for gpu in heartbeat.gpus if gpu.uuid is not None
    )


def _runs_through(state: State, attempt: Attempt, allocation: Allocation) -> bool:
    """Whether any of the attempt's nodes is held through it: one that was released may still list the same nodes."""
    holders = (state.held.get(node) for node in attempt.nodes)
    return any(holder is not None and holder.name == allocation.name for holder in holders)


def _judged(heartbeat: Heartbeat, judgement: Judgement, gpus: tuple[GpuPart, ...]) -> NodeJudged:
    return NodeJudged(
        node=heartbeat.node,
        host=heartbeat.host,
        verdict=judgement.verdict,
        reason=judgement.reason,
        source=judgement.source,
        at=heartbeat.ts,
        evidence=judgement.evidence,
        drill=judgement.drill,
        gpus=gpus,
    )
