"""The simulated node agents: they follow orders after a moment, start an attempt once, and end with their ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.health import Heartbeat, Xid
from opt_ops.core.values import RankExit
from opt_ops.laboratory.simulated.cluster import Cluster, Job
from opt_ops.laboratory.simulated.costs import Costs
from opt_ops.laboratory.simulated.evaluations import SimulatedEvaluation, SimulatedEvaluations
from opt_ops.laboratory.simulated.timeline import Timeline
from opt_ops.ports import Drilling, Launch, Membership, NodeRanksReport, Orders

_TERM, _KILL = 15, 9


@dataclass(slots=True)
class NodeRanks:
    """The ranks of one attempt on one node: their real state, and what the agent has reported."""

    attempt: str
    node: str
    started_at: float
    ranks: range
    alive: set[int]
    exits: list[RankExit] = field(default_factory=list[RankExit])
    report: NodeRanksReport | None = None
    ending: bool = False
    generation: int = 1  # the newest one that its agent has heard of
    began: dict[int, tuple[int, float]] = field(default_factory=dict[int, tuple[int, float]])
    """Rank → generation in which its process began, and when; if ranks can be replaced."""


@dataclass(slots=True)
class SimulatedAgent:
    """The agent on a node that a job holds."""

    node: str
    job: str
    allocation: str
    started_at: float
    orders: tuple[int, int] = (0, 0)
    part: NodeRanks | None = None
    leaving: bool = False
    asked: set[str] = field(default_factory=set[str])
    """Drills, saves and dumps that were carried out."""
    last: Heartbeat | None = None
    standbys: int = 0  # that are ordered
    warm_for: str = ""  # the attempt from whose trainer they, and the warm process, are
    warm_since: float = 0.0
    peer_lost_at: float | None = None  # since when it has told that a rank has lost a peer
    evaluation: SimulatedEvaluation | None = None


class NodeAgents:
    """All agents. They report ranks to the trainer by `started`, `fell`, `stuck`, `save_asked` and `dump_asked`."""

    def __init__(self, cluster: Cluster, costs: Costs, timeline: Timeline, wall: Callable[[], float]) -> None:
        self._cluster = cluster
        self._costs = costs
        self._timeline = timeline
        self._wall = wall  # seconds since the epoch by the nodes' clocks
        self.agents: dict[str, SimulatedAgent] = {}
        self.parts: dict[str, dict[str, NodeRanks]] = {}
        """Ranks by attempt and node."""
        self.starts: dict[tuple[str, str], int] = {}
        """How often ranks of an attempt were started on a node. More than once is an error."""
        self.last_heartbeats: dict[str, Heartbeat] = {}
        """The last heartbeats of nodes that are no longer reachable. The supervisor may not have read them yet."""
        self.orders: Orders | None = None
        self.evaluations = SimulatedEvaluations(costs, timeline)
        self.started: Callable[[Launch, str], None]
        self.fell: Callable[[str, str], None]
        self.survives: Callable[[str], bool]
        """Whether the other ranks of an attempt outlive the death of one."""
        self.joining: Callable[[Launch, bool], None]
        self.peers_lost_since: Callable[[str], float | None]
        """When the survivors of an attempt saw broken connections, if they wait because of that now."""
        self.stuck: Callable[[str, int], None]
        self.save_asked: Callable[[str], None]
        self.dump_asked: Callable[[NodeRanks, str], None]
        cluster.given = self.start
        cluster.taken = self.stop

    def start(self, job: Job) -> None:
        """Start an agent on each node of a job."""
        self._timeline.after(self._costs.agent_start, self._begin, job.number)

    def _begin(self, number: str) -> None:
        job = self._cluster.jobs[number]
        for name in job.nodes:
            if self._cluster.nodes[name].up:
                agent = SimulatedAgent(name, number, job.allocation, self._timeline.now)
                self.agents[name] = agent
                self.last_heartbeats.pop(name, None)
                self._follow(agent)
        self._timeline.disturb()

    def stop(self, node: str) -> None:
        """End an agent and its ranks. Nothing is left on the node to report that."""
        self.cut_off(node)
        agent = self.agents.pop(node, None)
        if agent is not None:
            self.evaluations.kill(agent.evaluation)
        if agent is None or agent.part is None:
            return
        agent.part.alive.clear()
        self._timeline.disturb()
        self.fell(agent.part.attempt, node)

    # ---- orders

    def order(self, orders: Orders) -> None:
        """Replace the orders on the shared file system."""
        self.orders = orders
        self._timeline.after(self._costs.obey, self._look)

    def _look(self) -> None:
        for agent in list(self.agents.values()):
            self._follow(agent)

    def cut_off(self, node: str) -> None:
        """Keep the last heartbeat of a node that becomes unreachable."""
        if (agent := self.agents.get(node)) and self._cluster.nodes[node].reachable:
            ts = self._wall() - (self._timeline.now - agent.started_at) % self._costs.heartbeat
            self.last_heartbeats[node] = self._heartbeat(agent, ts)

    def reconnect(self, node: str) -> None:
        """Publish the reports of a node that is reachable again, and let its agent follow the orders."""
        if agent := self.agents.get(node):
            self.last_heartbeats.pop(node, None)
            if agent.part is not None:
                self._publish(agent.part)
            self._follow(agent)

    def _follow(self, agent: SimulatedAgent) -> None:
        orders = self.orders
        if orders is None or not self._cluster.nodes[agent.node].reachable or self.agents.get(agent.node) is not agent:
            return
        seen = (orders.epoch, orders.seq)
        if seen < agent.orders:  # an older daemon process may still write orders; they are ignored
            return
        agent.orders = seen
        busy = agent.leaving or agent.part is not None
        agent.evaluation = self.evaluations.follow(agent.evaluation, orders, agent.node, agent.allocation, busy)
        launch = None if agent.leaving else orders.launch
        wanted = launch if launch is not None and launch.holders.get(agent.node) == agent.allocation else None
        if agent.part is not None and (wanted is None or agent.part.attempt != wanted.attempt):
            if agent.part.alive:
                self._end(agent.part)
                return
            agent.part = None
        if wanted is not None and agent.part is None:
            self._start(agent, wanted)
        elif wanted is not None and wanted.membership is not None and agent.part is not None:
            self._renew(agent, agent.part, wanted, wanted.membership)
        self._warm(agent, orders.launch)
        if agent.part is not None:
            self._ask(agent, agent.part, orders)
        for drill in orders.drills:
            self._drill(agent, drill)
        agent.leaving = agent.leaving or agent.allocation in orders.released
        if agent.leaving:
            self._leave(agent)

    def _start(self, agent: SimulatedAgent, launch: Launch) -> None:
        parts = self.parts.setdefault(launch.attempt, {})
        earlier = parts.get(agent.node)
        first = launch.nodes.index(agent.node) * launch.ranks_per_node
        ranks = range(first, first + launch.ranks_per_node)
        generation = launch.membership.generation if launch.membership else 1
        anew = launch.membership is not None and set(ranks) <= set(launch.membership.new)
        if earlier is not None and not (anew and earlier.generation < generation):
            # An earlier agent of this node started them, and they died with it.
            self._exit(earlier, set(earlier.ranks) - {each.rank for each in earlier.exits}, None, _KILL)
            agent.part = earlier
            return
        part = NodeRanks(launch.attempt, agent.node, self._wall(), ranks, set(ranks), generation=generation)
        if self._costs.in_place is not None:
            part.began = dict.fromkeys(ranks, (generation, part.started_at))
        parts[agent.node] = agent.part = part
        self._publish(part)
        key = (launch.attempt, agent.node)
        self.starts[key] = self.starts.get(key, 0) + 1
        if generation > 1:
            self.joining(launch, self._take_warm(agent))
        else:
            self.started(launch, agent.node)

    def _renew(self, agent: SimulatedAgent, part: NodeRanks, launch: Launch, membership: Membership) -> None:
        """Follow a newer generation: new processes take the place of lost ranks, and the others get its number."""
        if membership.generation <= part.generation or part.ending:
            return
        new = set(part.ranks) & set(membership.new)
        stale = sorted(new & part.alive)  # for example a rank that hangs
        part.exits += [
            RankExit(rank=rank, node=part.node, code=None, signal=_KILL, at=self._wall(), generation=part.generation)
            for rank in stale
        ]
        part.alive |= new
        part.began |= dict.fromkeys(new, (membership.generation, self._wall()))
        part.generation = membership.generation
        if self._cluster.nodes[part.node].reachable:
            self._publish(part)
        self.joining(launch, self._take_warm(agent) if new else True)

    def _warm(self, agent: SimulatedAgent, launch: Launch | None) -> None:
        """Start the warm process and the standby ranks, or end them, as ordered. Another attempt needs new ones."""
        if launch is None or self._costs.in_place is None:
            agent.warm_for, agent.standbys = "", 0
            return
        agent.standbys = launch.standbys.get(agent.node, 0)
        wanted = launch.attempt if agent.standbys or agent.node in launch.warm else ""
        if agent.warm_for != wanted:
            agent.warm_for, agent.warm_since = wanted, self._timeline.now

    def _take_warm(self, agent: SimulatedAgent) -> bool:
        """Start ranks from what is warm on the node, which is made anew. Returns whether it was ready."""
        ready = self._is_warm(agent)
        agent.warm_since = self._timeline.now
        return ready

    def _is_warm(self, agent: SimulatedAgent) -> bool:
        in_place = self._costs.in_place
        return in_place is not None and agent.warm_for != "" and self._timeline.now >= agent.warm_since + in_place.warm

    def cool(self) -> None:
        """End everything that is warm. The agents start it again at once."""
        for agent in self.agents.values():
            agent.warm_since = self._timeline.now

    def _ask(self, agent: SimulatedAgent, part: NodeRanks, orders: Orders) -> None:
        for kind, ident in (("save", orders.save), ("dump", orders.dump)):
            if ident is None or f"{kind} {ident}" in agent.asked:
                continue
            agent.asked.add(f"{kind} {ident}")
            if kind == "save":
                self.save_asked(part.attempt)
            else:
                self.dump_asked(part, ident)

    def _drill(self, agent: SimulatedAgent, drill: Drilling) -> None:
        if drill.drill in agent.asked:
            return
        agent.asked.add(drill.drill)
        arguments: dict[str, Any] = dict(drill.arguments)
        if drill.fault == "xid" and drill.node == agent.node:
            self.xid(agent.node, int(arguments["xid"]), drill.drill)
        elif agent.part is None or arguments.get("rank") not in agent.part.alive:
            return
        elif drill.fault == "kill-rank":
            self.kill(agent.part.attempt, arguments["rank"], None, _KILL)
        elif drill.fault == "hang":
            self.stuck(agent.part.attempt, arguments["rank"])

    def ready(self, agent: SimulatedAgent) -> int:
        """The number of standby ranks on a node that are ready."""
        return agent.standbys if self._is_warm(agent) else 0

    def _leave(self, agent: SimulatedAgent) -> None:
        if agent.part is not None and agent.part.alive:
            self._end(agent.part)
            return
        self.evaluations.kill(agent.evaluation)
        del self.agents[agent.node]
        job = self._cluster.jobs[agent.job]
        if not any(other.job == agent.job for other in self.agents.values()):
            self._cluster.end(job.number, "COMPLETED")

    # ---- ranks

    def xid(self, node: str, code: int, drill: str | None = None) -> None:
        """The kernel of the node logs an Xid error."""
        found = Xid(
            code=code, pci="0000:3b:00", line=f"NVRM: Xid (PCI:0000:3b:00): {code}", at=self._wall(), drill=drill
        )
        self._cluster.nodes[node].xids += (found,)
        self._timeline.disturb()

    def kill(self, attempt: str, rank: int, code: int | None, signal: int | None) -> None:
        """End one rank. Its peers die of it."""
        for part in self.running(attempt):
            if rank in part.alive:
                self._exit(part, {rank}, code, signal)
                if not self.survives(attempt):
                    self._timeline.after(self._costs.abort, self._abort, attempt)

    def _abort(self, attempt: str) -> None:
        for part in self.running(attempt):
            self._exit(part, set(part.alive), 1, None)

    def finish(self, attempt: str, code: int) -> None:
        """End every rank of an attempt with an exit code."""
        for part in self.running(attempt):
            self._exit(part, set(part.alive), code, None)

    def running(self, attempt: str) -> list[NodeRanks]:
        """Return the nodes' ranks of an attempt where a rank is alive."""
        return [part for part in self.parts.get(attempt, {}).values() if part.alive]

    def _end(self, part: NodeRanks) -> None:
        if not part.ending:
            part.ending = True
            self._timeline.after(self._costs.rank_end, self._ended, part)

    def _ended(self, part: NodeRanks) -> None:
        self._exit(part, set(part.alive), None, _TERM)

    def _exit(self, part: NodeRanks, ranks: set[int], code: int | None, signal: int | None) -> None:
        if not ranks:
            return
        part.alive -= ranks
        at = self._wall()
        part.exits += [
            RankExit(rank=rank, node=part.node, code=code, signal=signal, at=at, generation=part.generation)
            for rank in sorted(ranks)
        ]
        if self._cluster.nodes[part.node].reachable:
            self._publish(part)
        self._timeline.disturb()
        self.fell(part.attempt, part.node)
        agent = self.agents.get(part.node)
        if agent is not None and agent.part is part and not part.alive:
            self._timeline.after(0.0, self._follow, agent)

    @staticmethod
    def _publish(part: NodeRanks) -> None:
        exits, done = tuple(part.exits), not part.alive
        tails = {each.rank: "simulated: it ended" for each in exits if each.code != 0}
        pids = {rank: (began[0], 1000 + rank, began[1]) for rank, began in part.began.items() if rank in part.alive}
        part.report = NodeRanksReport(
            node=part.node, started_at=part.started_at, exits=exits, done=done, tails=tails, pids=pids
        )

    # ---- what a supervisor can read

    def reports(self, attempt: str) -> dict[str, NodeRanksReport]:
        """Return what the agents have reported about an attempt, by node."""
        parts = self.parts.get(attempt, {}).items()
        return {node: part.report for node, part in parts if part.report is not None}

    def heartbeats(self, read: dict[str, float]) -> list[Heartbeat]:
        """Return the newest heartbeat of each node, if it is later than its time in `read`, and update `read`.

        Heartbeats between would hold the same readings.
        """
        wall, now, every, nodes = self._wall(), self._timeline.now, self._costs.heartbeat, self._cluster.nodes
        new: list[Heartbeat] = []
        for name, last in self.last_heartbeats.items():
            if last.ts > read.get(name, 0.0):
                read[name] = last.ts
                new.append(last)
        lost = {attempt: self.peers_lost_since(attempt) for attempt in self._attempts()}
        for name, agent in self.agents.items():
            ts = wall - (now - agent.started_at) % every
            since = lost.get(agent.part.attempt) if agent.part and agent.part.alive else None
            if (agent.peer_lost_at is None) != (since is None):  # that is told at once
                ts, agent.peer_lost_at = wall - (now - since if since else 0.0), since
            if ts > read.get(name, 0.0) and nodes[name].reachable:
                read[name] = ts
                new.append(self._heartbeat(agent, ts))
        return new

    def _attempts(self) -> set[str]:
        """The attempts that run here, if their ranks outlive each other."""
        return {agent.part.attempt for agent in self.agents.values() if agent.part} if self._costs.in_place else set()

    def _heartbeat(self, agent: SimulatedAgent, ts: float) -> Heartbeat:
        """Return the heartbeat of a time. With unchanged readings, the last one gets the new time: that is cheaper."""
        node, last = self._cluster.nodes[agent.node], agent.last
        attempt = agent.part.attempt if agent.part else None
        warned = self._cluster.jobs[agent.job].warned
        peer_lost, standby = agent.peer_lost_at is not None, self.ready(agent)
        evaluation = agent.evaluation.report if agent.evaluation is not None else None
        if (
            last is not None
            and last.gpus is node.gpus
            and last.xids is node.xids
            and last.attempt == attempt
            and last.orders == agent.orders
            and last.warned == warned
            and last.peer_lost == peer_lost
            and last.standby == standby
            and last.evaluation == evaluation
        ):
            object.__setattr__(last, "ts", ts)
            return last
        agent.last = Heartbeat(
            node=agent.node,
            host=node.host,
            ts=ts,
            attempt=attempt,
            nvml="ok",
            orders=agent.orders,
            gpus=node.gpus,
            xids=node.xids,
            allocation=agent.allocation,
            warned=warned,
            peer_lost=peer_lost,
            standby=standby,
            evaluation=evaluation,
        )
        return agent.last
