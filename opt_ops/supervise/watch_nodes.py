"""Watches the held nodes: verdicts by their heartbeats, and nodes whose heartbeats stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from opt_ops.core.decide.policy import Policy
from opt_ops.core.events import Event, NodeJudged, SignalRaised, StandbySeen
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.health import (
    EvaluationReport,
    Heartbeat,
    History,
    Judgement,
    differing,
    judge,
    rank,
    remember,
    same_readings,
)
from opt_ops.core.health.energy import EnergyMeter
from opt_ops.core.health.silence import SPREAD_SECONDS, TOLD_SECONDS, Silence
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Allocation, Node, State
from opt_ops.core.values import GpuPart, Tier, Verdict
from opt_ops.ports import Agents, Clock
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.watch_allocation import AllocationWatch
from opt_ops.supervise.watch_training import TrainingWatch

END_REASON_SECONDS = 20.0  # a scheduler ends the processes of a job first, and reports its end and the reason later
_COMPARE_SECONDS = 30.0  # between two comparisons of the nodes with each other
_DRIFT_SECONDS = 3600.0  # the same, while no node reports anything new


class NodeWatch:
    """Judges the held nodes by their newest heartbeats, and reports nodes without a heartbeat."""

    def __init__(
        self,
        policy: Policy,
        allocation: AllocationWatch,
        training: TrainingWatch,
        agents: Agents,
        clock: Clock,
        histories: Mapping[str, History] | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`histories`: what earlier daemon processes found about nodes. `guard`: tells of parts that fail."""
        self._guard = guard or Guard(clock)
        self._policy = policy
        self._allocation = allocation
        self._training = training
        self._agents = agents
        self._clock = clock
        self._newest: dict[str, Heartbeat] = {}
        self._silence = Silence(policy.silent_seconds)
        self._steady: dict[str, set[bool]] = {}
        """By node: the cases (idle: True, with ranks: False) in which equal readings leave its history as it is."""
        self._judged: dict[str, Node] = {}
        """The nodes about which nothing is new since their verdict in the state."""
        self._bad_parts: Mapping[str, str] = {}
        self._from_others: tuple[Mapping[str, object], ...] = ({}, {})
        """What the scheduler and the comparison last said about nodes."""
        self._new_readings = False
        self._histories: dict[str, History] = dict(histories or {})
        self._differing: Mapping[str, Judgement] = {}
        self._compared_at = clock.monotonic()
        self._energy = EnergyMeter()

    def lost(self, node: str) -> bool:
        """Whether the node is silent by its own fault, as far as this daemon process knows."""
        return self._silence.lost(node)

    def all_reported_within(self, nodes: Iterable[str], seconds: float) -> bool:
        """Whether a heartbeat of each of these nodes was read in the last `seconds`."""
        now = self._clock.monotonic()
        read = [at for node in nodes if (at := self._silence.heard_at(node)) is not None]
        return all(now - at <= seconds for at in read)

    def orders_seen(self, node: str) -> tuple[int, int]:
        """Epoch and sequence number of the orders that the node's agent last acted on; (0, 0) if unknown."""
        heartbeat = self._newest.get(node)
        return heartbeat.orders if heartbeat else (0, 0)

    def orders_refused(self, node: str) -> str | None:
        """Why the node's agent does not obey the orders that it found; None: it obeys them, or is silent."""
        heartbeat = self._newest.get(node)
        return None if heartbeat is None or self._silence.silent(node) else heartbeat.orders_refused

    def evaluation(self, node: str) -> EvaluationReport | None:
        """The evaluation that the node's agent runs or has run, by its newest heartbeat."""
        heartbeat = self._newest.get(node)
        return heartbeat.evaluation if heartbeat is not None else None

    def warned(self, node: str) -> bool:
        """Whether the scheduler has given the node's agent notice that its job ends."""
        heartbeat = self._newest.get(node)
        return heartbeat is not None and heartbeat.warned

    def xids_since(self, node: str, since: float) -> tuple[int, ...]:
        """The Xids that the node's newest heartbeat names from `since` on (seconds since the epoch), without drills."""
        heartbeat = self._newest.get(node)
        found = heartbeat.xids if heartbeat else ()
        return tuple(sorted({xid.code for xid in found if xid.at >= since and not xid.switch and xid.drill is None}))

    def observe(self, state: State) -> Iterator[Event]:
        """Yield new verdicts, and signals for silent nodes on which the attempt runs."""
        held, now = state.held, self._clock.monotonic()
        heard: set[str] = set()
        for heartbeat in self._guard.each("heartbeats", self._agents.heartbeats):
            holder = held.get(heartbeat.node)
            if holder is None or heartbeat.allocation in (None, holder.name):
                if holder is not None:
                    heard.add(heartbeat.node)
                    self._guard.call("energy", partial(self._energy.add, heartbeat), None)
                self._guard.call("readings", partial(self._take_heartbeat, heartbeat), None)
        # Agents of a suspended job are stopped: their silence says nothing, and counts from the resumption on.
        awake = [name for name, holder in held.items() if not holder.suspended]
        attempt = state.attempt
        self._silence.look(now, heard, awake, attempt.nodes if attempt else (), self._without_a_peer(attempt))
        if metered := self._guard.call("energy", lambda: self._energy.account(state.ended), None):
            yield metered
        self._guard.call("the comparison of nodes", lambda: self._compare(held, now), None)
        self._judge_again_if_others_changed(state)
        if attempt is not None and attempt.live and any(map(self.lost, attempt.nodes)):
            yield from self._training.observe(state)  # first read the steps that came while the daemon was held up
        yield from self._guard.each("warm ranks", partial(self._standbys, state, heard))
        for name in held:
            if self._silence.silent(name):
                known = state.nodes.get(name, Node(name=name))
                yield from self._guard.each("silent nodes", partial(self._heartbeat_timed_out, state, known))
            elif name not in self._judged or self._judged[name] is not state.nodes.get(name):
                yield from self._guard.each("verdicts on nodes", partial(self._verdict, state, name))

    def _without_a_peer(self, attempt: Attempt | None) -> list[str]:
        """The nodes where a rank has lost a peer, unless it is known whom: ranks are replaced, or the attempt ends."""
        if attempt is None or not attempt.live or attempt.stop_why is not None or attempt.rejoining is not None:
            return []
        newest = ((name, self._newest.get(name)) for name in attempt.nodes)
        return [name for name, last in newest if last is not None and last.peer_lost and last.attempt == attempt.name]

    def _standbys(self, state: State, heard: Iterable[str]) -> Iterator[Event]:
        """Yield how many warm ranks wait on the nodes that were heard, where that has changed."""
        for name in sorted(heard):
            known, newest = state.nodes.get(name), self._newest.get(name)
            if known is not None and newest is not None and newest.standby != known.standby:
                yield StandbySeen(node=name, ready=newest.standby)

    def _judge_again_if_others_changed(self, state: State) -> None:
        """Mark nodes for a new verdict if the list of bad parts, the scheduler or the comparison says something new."""
        if self._bad_parts != state.bad_parts:
            self._bad_parts = state.bad_parts
            self._judged.clear()
        before, self._from_others = self._from_others, (self._allocation.unfit, self._differing)
        for old, new in zip(before, self._from_others, strict=True):
            for name in old.keys() | new.keys() if old != new else ():
                if old.get(name) != new.get(name):
                    self._judged.pop(name, None)

    def _take_heartbeat(self, heartbeat: Heartbeat) -> None:
        name = heartbeat.node
        before = self._newest.get(name)
        self._newest[name] = heartbeat
        same, idle = before is not None and same_readings(before, heartbeat), heartbeat.idle
        if same and idle in self._steady.get(name, ()):
            return  # the case of nearly every heartbeat
        history, steady = self._histories.get(name, History()), self._steady.setdefault(name, set())
        if not same:
            steady.clear()
        after = remember(history, heartbeat, self._policy.expected_gpus)
        if after.counts or after.streaks:
            steady.clear()
        if not after.counts and (after == history if same else not after.streaks):
            steady.add(idle)
        self._histories[name] = after
        self._judged.pop(name, None)
        self._new_readings = True

    def _compare(self, held: Mapping[str, Allocation], now: float) -> None:
        """Compare the nodes with each other. Drifting clocks are found even while no node reports anything new."""
        waited = now - self._compared_at
        if waited < _COMPARE_SECONDS or not (self._new_readings or waited >= _DRIFT_SECONDS):
            return
        self._compared_at, self._new_readings = now, False
        present = (name for name in held if name in self._newest and self._silence.seconds(name) <= SPREAD_SECONDS)
        self._differing = differing([self._newest[name] for name in present], self._policy.expected_gpus)

    def _verdict(self, state: State, name: str) -> Iterator[Event]:
        """Judge a node about which something is new."""
        heartbeat, known = self._newest.get(name), state.nodes.get(name)
        if heartbeat is None:
            return
        node = known or Node(name=name)
        judgement = self._judge(state, node, heartbeat)
        gpus = _parts(heartbeat)
        new_gpus = () if gpus == node.gpus else gpus
        if (judgement.verdict, judgement.reason) != (node.verdict, node.reason) or new_gpus:
            yield from self._report_progress(state, name)
            yield _node_judged(heartbeat, judgement, new_gpus)
        elif known is not None:
            self._judged[name] = known

    def _report_progress(self, state: State, node: str) -> Iterator[Event]:
        attempt = state.attempt
        if attempt is not None and attempt.live and node in attempt.nodes:
            yield from self._training.report_progress(attempt)

    def _judge(self, state: State, node: Node, heartbeat: Heartbeat) -> Judgement:
        """Judge the node by its readings, its GPUs' past in this lineage, the scheduler, and the other nodes."""
        xids = tuple(xid for xid in heartbeat.xids if xid.at > node.allowed_at)
        burn_in = heartbeat.burn_in if heartbeat.burned_at > node.allowed_at else None
        since = replace(heartbeat, xids=xids, burn_in=burn_in)
        judgement = judge(since, self._policy.expected_gpus, self._histories.get(node.name))
        if judgement.verdict is Verdict.BAD:
            return judgement
        for gpu in heartbeat.gpus:
            if gpu.uuid is not None and gpu.uuid in state.bad_parts:
                evidence = {"uuid": gpu.uuid, "serial": gpu.serial, "was_in": state.bad_parts[gpu.uuid]}
                source = "the journal of this lineage: the GPU failed here before, and no operator has allowed it again"
                return Judgement(verdict=Verdict.BAD, reason="known_bad_gpu", source=source, evidence=evidence)
        why = self._allocation.unfit.get(heartbeat.node)
        if why is None:
            odd = self._differing.get(node.name, judgement)
            stale = odd.reason.startswith("burn_in_") and burn_in is None
            return odd if not stale and (judgement.reason == "ok" or rank(odd) < rank(judgement)) else judgement
        source = "the scheduler: what runs on the node may continue, nothing new starts there"
        return Judgement(verdict=Verdict.SUSPECT, reason=why, source=source)

    def _heartbeat_timed_out(self, state: State, node: Node) -> Iterator[Event]:
        seconds = self._silence.seconds(node.name)
        reason = "silent" if self.lost(node.name) else "unheard"  # no node is called silent for what hides all of them
        patience, peers = self._policy.silent_seconds, ""
        if self._silence.told(node.name):
            patience, peers = TOLD_SECONDS, ", and ranks on other nodes have lost a peer"
        if node.reason != reason:
            yield NodeJudged(
                node=node.name,
                host=node.host,
                verdict=Verdict.UNKNOWN,
                reason=reason,
                source=f"no heartbeat for {patience:g} s{peers}",
                at=self._clock.now() - seconds,
                evidence={"seconds": seconds},
            )
        attempt = state.attempt
        if attempt is None or not attempt.live or node.name not in attempt.nodes or not self.lost(node.name):
            return
        if self.warned(node.name) and seconds < self._policy.silent_seconds + END_REASON_SECONDS:
            return  # its job was about to end: the scheduler will report that, and the reason
        if self._training.idle_seconds(attempt) < patience:
            return  # a step needs the ranks of every node: while steps come, the node works
        yield from self._training.report_progress(attempt)
        raised = SignalRaised(
            generation=attempt.generation,
            signal=FailureClass.SILENT_NODE,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=attempt.last_step,
            onset_step=None,
            at=self._clock.now() - seconds,
            nodes=(node.name,),
            rule=f"no heartbeat and no step for {patience:g} s{peers}",
            evidence={"seconds": seconds},
        )
        if raised.key not in state.signals:
            yield raised


def _parts(heartbeat: Heartbeat) -> tuple[GpuPart, ...]:
    return tuple(
        GpuPart(uuid=gpu.uuid, serial=gpu.serial, name=gpu.name) for gpu in heartbeat.gpus if gpu.uuid is not None
    )


def _node_judged(heartbeat: Heartbeat, judgement: Judgement, gpus: tuple[GpuPart, ...]) -> NodeJudged:
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
