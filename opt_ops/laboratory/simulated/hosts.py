"""Faults that lose hosts for good, and the hosts that replace them. A replacement may be bad, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opt_ops.laboratory.simulated.faults import BadGpu
from opt_ops.laboratory.simulated.in_place import keepers_of
from opt_ops.laboratory.simulated.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacementNode:
    """A host that comes `after` seconds from the loss. The host that it replaces leaves the cluster then."""

    name: str
    after: float
    bad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseHosts:
    """Hosts of the running attempt fail together: they go silent, or one GPU of each falls off the bus (Xid 79)."""

    replacements: tuple[tuple[ReplacementNode, ...], ...]  # for each lost host
    silent: bool = False
    pair: bool | None = None  # whether two of them hold each other's copies; None: as chance has it

    def strike(self, world: World) -> None:
        """Lose the hosts, and schedule their replacements."""
        training = world.running
        if training is None:
            return
        lost = list(training.launch.nodes)
        chosen: list[str] = []
        for replacements in self.replacements:
            name = lost.pop(lost.index(world.choose(self._possible(training.launch.nodes, lost, chosen))))
            chosen.append(name)
            if self.silent:
                world.cluster.break_down(name)
            else:
                world.agents.xid(name, 79)
            send(world, name, replacements)
            if not self.silent:
                _kill(world, name)

    def _possible(self, nodes: Sequence[str], left: list[str], chosen: list[str]) -> list[str]:
        if self.pair is None or not chosen:
            return left
        keepers = keepers_of(nodes)
        tied = {keepers.get(name) for name in chosen} | {each for each in left if keepers.get(each) in chosen}
        if self.pair:
            return [each for each in left if each in tied] if len(chosen) == 1 else left
        return [each for each in left if each not in tied] or left


def _kill(world: World, name: str) -> None:
    """Kill the first rank of the node, unless the attempt has just ended for another host."""
    training = world.running
    for part in world.agents.running(training.launch.attempt) if training else ():
        if part.node == name:
            world.agents.kill(part.attempt, min(part.alive), 1, None)


def send(world: World, lost: str, replacements: Sequence[ReplacementNode]) -> None:
    """Schedule the hosts that replace a lost one, one after the other."""
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
    """All nodes are lost at once, with their jobs. The cluster returns in parts, with some bad hosts."""

    back: tuple[tuple[float, int], ...]
    """(seconds from the loss, number of good hosts that are back by then)."""
    bad: int = 0
    """Number of bad hosts that come with the first part, each with a lost GPU."""
    names: tuple[str, ...] = ()
    """Names of the hosts that come."""

    def strike(self, world: World) -> None:
        """Lose all nodes, and schedule their return."""
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
