"""The faults of a simulated world, each a value with `strike(world)`.

If a node or rank is not given, the seed of the world chooses one of the running attempt. A fault that finds nothing to
strike, for example because no attempt runs, does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Ending, SimulatedFault, World
from opt_ops.ports import Request


def _node(world: World, node: str | None) -> str | None:
    if node is not None:
        return node
    training = world.running
    return world.choose(training.launch.nodes) if training else None


@dataclass(frozen=True, slots=True, kw_only=True)
class KillRank:
    """A rank dies by a signal, or ends with an exit code."""

    rank: int | None = None
    signal: int | None = 9
    code: int | None = None

    def strike(self, world: World) -> None:
        """Kill the rank. Its peers die of it."""
        training = world.running
        if training is None:
            return
        ranks = sorted(rank for part in world.agents.running(training.launch.attempt) for rank in part.alive)
        rank = self.rank if self.rank is not None else int(world.choose([str(each) for each in ranks]))
        signal = None if self.code is not None else self.signal
        world.agents.kill(training.launch.attempt, rank, self.code, signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipBit:
    """A bit flips in the data of a rank. Nothing shows it until the ranks compare checksums."""

    rank: int | None = None

    def strike(self, world: World) -> None:
        """Flip the bit."""
        training = world.running
        if training is None:
            return
        ranks = len(training.launch.nodes) * training.launch.ranks_per_node
        training.flipped = (
            self.rank if self.rank is not None else int(world.choose([str(each) for each in range(ranks)]))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """Training hangs, and every process runs. `rank` is the one that the others wait for."""

    rank: int = 0

    def strike(self, world: World) -> None:
        """Stop all steps."""
        if training := world.running:
            world.hang(training.launch.attempt, self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverge:
    """The loss diverges, or is not finite, at a step, and does not recover."""

    divergence: Divergence

    def strike(self, world: World) -> None:
        """Put the divergence into the curve."""
        world.curve.divergences.append(self.divergence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bump:
    """A spike of the loss that recovers without action."""

    step: int
    height: float = 1.0
    steps: int = 20

    def strike(self, world: World) -> None:
        """Put the divergence into the curve."""
        for number in range(self.steps):
            world.curve.bumps[self.step + number] = self.height * (1.0 - number / self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadGpu:
    """A GPU fails: an Xid in the kernel log or, without an Xid, a lost GPU. Its rank may die of it."""

    node: str | None = None
    xid: int | None = 79
    kills: bool = False

    def strike(self, world: World) -> None:
        """Show the failure in the readings of the node."""
        name = _node(world, self.node)
        if name is None:
            return
        node = world.cluster.nodes[name]
        if self.xid is not None:
            world.agents.xid(name, self.xid)
        else:
            node.gpus = (replace(node.gpus[0], error="gpu_is_lost"), *node.gpus[1:])
        training = world.running
        if self.kills and training is not None:
            for part in world.agents.running(training.launch.attempt):
                if part.node == name:
                    world.agents.kill(training.launch.attempt, min(part.alive), 1, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDown:
    """A node crashes, and is repaired after `seconds` (None: never). `relapse`: it returns with a lost GPU."""

    node: str | None = None
    seconds: float | None = 5 * 3600.0
    relapse: bool = False

    def strike(self, world: World) -> None:
        """Crash the node, and schedule its repair."""
        name = _node(world, self.node)
        if name is None:
            return
        world.cluster.break_down(name)
        if self.seconds is not None:
            world.timeline.after(self.seconds, world.cluster.come_back, name)
            if self.relapse:
                world.timeline.after(self.seconds, world.strike, BadGpu(node=name, xid=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCutOff:
    """A node is cut off: its ranks run, but no heartbeat arrives, and collectives hang."""

    node: str | None = None
    seconds: float = 600.0

    def strike(self, world: World) -> None:
        """Cut the node off, and schedule its return."""
        name = _node(world, self.node)
        if name is None:
            return
        world.agents.cut_off(name)
        world.cluster.nodes[name].reachable = False
        for attempt, nodes in world.alive().items():
            if name in nodes:
                world.hang(attempt, None)
        world.timeline.after(self.seconds, _reconnect, world, name)


def _reconnect(world: World, name: str) -> None:
    world.cluster.nodes[name].reachable = True
    world.timeline.disturb()
    world.agents.reconnect(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowDown:
    """The ranks of a node are slow, and the others wait for them."""

    node: str | None = None
    factor: float = 1.5
    seconds: float = 3600.0

    def strike(self, world: World) -> None:
        """Slow the node down for a while."""
        name = _node(world, self.node)
        if name is None:
            return
        _slow(world, name, self.factor)
        world.timeline.after(self.seconds, _slow, world, name, 1.0)


def _slow(world: World, name: str, factor: float) -> None:
    world.cluster.nodes[name].slowness = factor
    training = world.running
    if training is not None and name in training.launch.nodes:
        training.slow = (
            {**training.slow, name: factor}
            if factor > 1.0
            else {node: each for node, each in training.slow.items() if node != name}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob:
    """A job that holds nodes, or waits for them, is cancelled, or is preempted after a notice."""

    reason: str = "CANCELLED"
    notice: float = 0.0

    def strike(self, world: World) -> None:
        """End the oldest live job."""
        live = world.cluster.live
        if live:
            live[0].warned = self.notice > 0 or live[0].warned
            world.timeline.after(self.notice, world.cluster.end, live[0].number, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerAway:
    """The scheduler does not answer. What runs continues."""

    seconds: float = 300.0

    def strike(self, world: World) -> None:
        """Stop the answers for a while."""
        world.cluster.conditions.away_until = world.now + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAnswer:
    """The answer to the next submission is lost. `accepted`: the job exists nevertheless."""

    accepted: bool = True

    def strike(self, world: World) -> None:
        """Prepare this for the next submission."""
        world.cluster.conditions.lost_answers.append(self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoNodes:
    """No job gets nodes for a while."""

    seconds: float = 3600.0

    def strike(self, world: World) -> None:
        """Close the queue, and schedule its opening."""
        world.cluster.conditions.no_nodes_until = world.now + self.seconds
        world.timeline.after(self.seconds, world.cluster.give)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """The next committed checkpoint differs from its manifest."""

    def strike(self, world: World) -> None:
        """Prepare this for the next commit."""
        world.damage_next.append("__0_0.distcp: the content differs from the manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockJump:
    """The wall clock of the daemon's host is set to another time. The monotonic clock is not."""

    seconds: float

    def strike(self, world: World) -> None:
        """Set the clock."""
        world.skew += self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An operator leaves a request."""

    request: str
    verb: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    author: str = "ann"

    def strike(self, world: World) -> None:
        """Put the request into the inbox."""
        world.ask(self.as_request())

    def as_request(self) -> Request:
        """Return the request as the daemon reads it."""
        return Request(request=self.request, author=self.author, verb=self.verb, arguments=self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseTelemetry:
    """The telemetry of the running attempt does not arrive, from a step on."""

    from_step: int

    def strike(self, world: World) -> None:
        """Lose the lines."""
        if training := world.running:
            training.unseen_from = self.from_step


@dataclass(frozen=True, slots=True, kw_only=True)
class EndThus:
    """The first attempt that comes to a step ends there in a given way."""

    ending: Ending

    def strike(self, world: World) -> None:
        """Prepare the end."""
        world.ending = self.ending


@dataclass(frozen=True, slots=True, kw_only=True)
class FailLaunches:
    """The next launches fail: the ranks load their checkpoint, and one of them ends with an error."""

    times: int = 1

    def strike(self, world: World) -> None:
        """Prepare this for the next launches."""
        world.failing_launches += self.times


@dataclass(frozen=True, slots=True, kw_only=True)
class FailReplacements:
    """The next generations of ranks do not come together: the survivors wait in vain."""

    times: int = 1

    def strike(self, world: World) -> None:
        """Prepare this for the next generations."""
        world.generations.failing += self.times


@dataclass(frozen=True, slots=True, kw_only=True)
class CoolStandbys:
    """All standby ranks end, and start again."""

    def strike(self, world: World) -> None:
        """End them."""
        world.agents.cool()
        world.timeline.disturb()


@dataclass(frozen=True, slots=True, kw_only=True)
class KillEvaluation:
    """The evaluation of a checkpoint that runs is killed with SIGKILL."""

    def strike(self, world: World) -> None:
        """Kill it."""
        for each in world.evaluations.all:
            if each.runs:
                world.evaluations.finish(each)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailEvaluations:
    """The next evaluations of checkpoints fail."""

    times: int = 1

    def strike(self, world: World) -> None:
        """Prepare this for the next ones."""
        world.evaluations.failing += self.times


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """Another fault, some seconds later: for example in the middle of the next step."""

    fault: SimulatedFault
    seconds: float

    def strike(self, world: World) -> None:
        """Schedule it."""
        world.timeline.after(self.seconds, world.strike, self.fault)
