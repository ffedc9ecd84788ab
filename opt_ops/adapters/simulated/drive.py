"""Drives a supervisor through virtual time: closely while something happens, in strides while nothing does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from opt_ops.adapters.simulated.world import World
from opt_ops.core.run import State


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the supervisor looks, in virtual seconds."""

    tick: float = 5.0  # while something happens, and nothing is trained
    stride: float = 300.0  # at most, while training goes on
    settle: float = 180.0  # without anything that happens, before it strides: longer than most of its patiences


class Supervised(Protocol):
    """What is driven: a supervisor."""

    state: State

    def tick(self) -> bool:
        """One round. Returns whether anything was journaled."""
        ...


def run(world: World, supervisor: Supervised, until: float, pace: Pace | None = None) -> State:
    """Let the supervisor tick until the lineage is settled, or until virtual time `until` (seconds).

    Whatever a tick raises ends the run; the world is then as it was left.
    """
    while not supervisor.state.settled and world.now < until:
        supervisor.tick()
        pass_time(world, until, pace)
    return supervisor.state


def pass_time(world: World, until: float, pace: Pace | None = None) -> None:
    """Let time pass until the supervisor should look again.

    A stride ends at once when something happens in the world, so it costs no detection: silence, deaths, divergences
    and requests are seen at the pace of ticks.
    """
    pace = pace or Pace()
    if world.calm > pace.settle:
        world.advance(min(world.now + pace.stride, until), pausing=True)
    else:
        world.advance(min(world.now + pace.tick, until))
