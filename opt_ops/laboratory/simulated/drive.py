"""Drives a supervisor through virtual time: closely while something happens, in strides while nothing does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from opt_ops.core.state.model import State
from opt_ops.laboratory.simulated.world import World


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the supervisor looks, in virtual seconds."""

    tick: float = 5.0  # right after something has happened
    stride: float = 300.0  # at most, while training goes on
    settle: float = 180.0  # of training without anything that happens, before it strides
    idle: float = 30.0  # at most, while nothing is trained


_LATE = 12.0  # a patience is noticed to have run out at most this fraction of it late


class Supervised(Protocol):
    """What is driven: a supervisor."""

    @property
    def state(self) -> State:
        """As far as it knows."""
        ...

    def tick(self) -> bool:
        """One round. Returns whether anything was journaled."""
        ...


def run(world: World, supervisor: Supervised, until: float, pace: Pace | None = None) -> State:
    """Let the supervisor tick until the lineage is settled, or until virtual time `until` (seconds).

    Whatever a tick raises ends the run; the world is then as it was left.
    """
    while not supervisor.state.finished and world.now < until:
        supervisor.tick()
        pass_time(world, until, pace)
    return supervisor.state


def pass_time(world: World, until: float, pace: Pace | None = None) -> None:
    """Let time pass until the supervisor should look again.

    What happens in the world is seen at the next tick: silence, deaths, divergences and requests as soon as by a
    supervisor that always ticks. What only time makes true, a patience that has run out, may be seen late by a twelfth.
    """
    pace = pace or Pace()
    if world.calm > pace.settle:
        wait = pace.stride
    else:
        wait = max(pace.tick, min(pace.idle, (world.now - world.timeline.disturbed_at) / _LATE))
    if wait <= pace.tick:
        world.advance(min(world.now + pace.tick, until))
        return
    began = world.now
    world.advance(min(began + wait, until), pausing=True)
    ticks = math.ceil((world.now - began) / pace.tick)
    world.advance(min(began + ticks * pace.tick, until))
