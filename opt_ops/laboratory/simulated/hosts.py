"""Hosts that are lost for good, and those that the provider sends for them: not all of which are any better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opt_ops.laboratory.simulated.faults import BadGpu
from opt_ops.laboratory.simulated.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacementNode:
    """A host that the provider sends, `after` seconds from the loss; the one before it is taken away then."""

    name: str
    after: float
    bad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseHosts:
    """Hosts of the running attempt fail together: they go silent, or a GPU of each falls off the bus (Xid 79)."""

    replacements: tuple[tuple[ReplacementNode, ...], ...]  # of each host that is lost
    silent: bool = False

    def strike(self, world: World) -> None:
        """Lose them, and have others sent."""
        training = world.running
        if training is None:
            return
        lost = list(training.launch.nodes)
        for replacements in self.replacements:
            name = lost.pop(lost.index(world.choose(lost)))
            if self.silent:
                world.cluster.break_down(name)
            else:
                world.agents.xid(name, 79)
            send(world, name, replacements)
            if not self.silent:
                _kill(world, name)


def _kill(world: World, name: str) -> None:
    """The first rank of the node dies of its GPU; nothing if the attempt has just died of another."""
    training = world.running
    for part in world.agents.running(training.launch.attempt) if training else ():
        if part.node == name:
            world.agents.kill(part.attempt, min(part.alive), 1, None)


def send(world: World, lost: str, replacements: Sequence[ReplacementNode]) -> None:
    """Have hosts come, one after the other, in the place of one that is lost."""
    for replacement in replacements:
        world.timeline.after(replacement.after, _replace, world, lost, replacement)
        lost = replacement.name


def _replace(world: World, lost: str, replacement: ReplacementNode) -> None:
    world.cluster.take_away(lost)
    world.cluster.come_back(replacement.name)
    if replacement.bad:
        BadGpu(node=replacement.name, xid=None).strike(world)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseCluster:
    """Every node goes at once, and its jobs with it. It comes back in parts, some of it bad."""

    back: tuple[tuple[float, int], ...]
    """(seconds from the loss, how many hosts are there by then), the bad ones not counted."""
    bad: int = 0
    """Hosts that come with the first part, each with a GPU that is lost."""
    names: tuple[str, ...] = ()
    """Of the hosts that come."""

    def strike(self, world: World) -> None:
        """Delete it."""
        for name, node in world.cluster.nodes.items():
            if node.up:
                world.cluster.break_down(name)
        for job in world.cluster.live:
            if job.nodes:
                world.cluster.end(job.number, "NODE_FAIL")
        bad, good = self.names[: self.bad], list(self.names[self.bad :])
        there = 0
        for seconds, count in self.back:
            world.timeline.after(seconds, _return, world, tuple(good[there:count]), ())
            there = count
        world.timeline.after(self.back[0][0], _return, world, (), bad)


def _return(world: World, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    for name in (*good, *bad):
        world.cluster.come_back(name)
    for name in bad:
        BadGpu(node=name, xid=None).strike(world)
